"""A judge behind a real HTTP endpoint: both orders, ties, and everything it said."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from made_up_run import made_up_run

from spin_ray import judge
from spin_ray.errors import ConfigError, StageError
from spin_ray.judge import Judge, Judgement, summarise


def judgements(*verdicts: tuple[str, str]) -> list[Judgement]:
    """For each prompt the verdicts of the orders (one, other) and (other, one)."""
    return [
        Judgement(f"p{number}", *order, verdict, "")
        for number, both in enumerate(verdicts)
        for order, verdict in zip((("one", "other"), ("other", "one")), both, strict=True)
    ]


@pytest.mark.parametrize(
    ("verdicts", "counted"),
    [
        (("first", "second"), "wins"),  # better in both places
        (("second", "first"), "losses"),
        (("first", "tie"), "wins"),
        (("tie", "first"), "losses"),
        (("tie", "tie"), "ties"),
        (("first", "first"), "ties"),  # it likes the first place
        (("unclear", "first"), "unclear"),
    ],
)
def test_only_a_verdict_that_the_other_order_does_not_contradict_counts(verdicts, counted):
    found = summarise(judgements(verdicts), "one", "other")
    assert {name for name in ("wins", "ties", "losses", "unclear") if found[name]} == {counted}
    assert found["contradicting"] == (verdicts == ("first", "first"))


def test_the_win_rate_counts_ties_half():
    """Win, win, loss, tie: (1 + 1 + 0 + ½) / 4; variance 0.6875 / 3 over four prompts."""
    found = summarise(
        judgements(("first", "second"), ("first", "second"), ("second", "first"), ("tie", "tie")), "one", "other"
    )
    assert found["win_rate"] == 0.625
    assert found["standard_error"] == pytest.approx((0.6875 / 3 / 4) ** 0.5)


@pytest.fixture
def endpoint():
    """Prefers whatever mentions iter_001, and says so in OpenAI's form; remembers what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        asked: list[dict] = []  # noqa: RUF012

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.asked.append(body | {"path": self.path})
            first = body["messages"][0]["content"].partition('name="A"')[2].partition("</reply>")[0]
            text = f"It could be [[C]], but no. {'[[A]]' if 'iter_001' in first else '[[B]]'}"
            answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Handler.asked
    server.shutdown()
    server.server_close()


def test_every_pair_is_judged_in_both_orders_and_nothing_said_is_lost(tmp_path, endpoint):
    url, asked = endpoint
    run = made_up_run(tmp_path / "run")
    found = judge.run(run, run.config(), "iter_001", "sft", Judge(endpoint=url, model="j"), limit=9)
    assert (found["wins"], found["losses"], found["win_rate"]) == (3, 0, 1.0)
    assert {body["path"] for body in asked} == {"/v1/chat/completions"}
    assert len(asked) == 6
    raw = [json.loads(line) for line in run.storage.read("judgements/iter_001-sft.jsonl").decode().splitlines()]
    assert sorted(line["verdict"] for line in raw) == ["first"] * 3 + ["second"] * 3
    assert all("It could be [[C]]" in line["text"] for line in raw)


def test_an_endpoint_that_is_not_there_is_an_error(tmp_path):
    run = made_up_run(tmp_path / "run")
    gone = Judge(endpoint="http://user:SECRETSECRET@127.0.0.1:9/v1", model="j")
    with pytest.raises(StageError, match="gave no judgement") as caught:
        judge.run(run, run.config(), "iter_001", "sft", gone, limit=1)
    assert "SECRET" not in str(caught.value)


def test_an_iterate_without_samples_is_an_error(tmp_path):
    run = made_up_run(tmp_path / "run", iterations=4, done=1)
    with pytest.raises(ConfigError, match="no held-out samples"):
        judge.run(run, run.config(), "iter_002", "sft", Judge(endpoint="http://x", model="j"), limit=1)
