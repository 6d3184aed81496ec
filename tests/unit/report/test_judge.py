"""A judge behind a real HTTP endpoint: both orders, ties, and everything it said."""

import json
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from spin_ray.errors import ConfigError, StageError
from spin_ray.inputs.model_folder import folder_entries
from spin_ray.report import judge
from spin_ray.report.judge import Judge, Judgement, summarise
from spin_ray.report.judged import read_judged
from spin_ray.run_dir.artefact import Manifest
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.storage import MANIFEST, Storage
from tests.support.made_up_run import TINY, made_up_run

ALONE = {f"p{number}": number for number in range(5)}
"""Number of each prompt's conversation."""


def judgements(*verdicts: tuple[str, str]) -> list[Judgement]:
    """For each prompt the verdicts of the orders (one, other) and (other, one)."""
    return [
        Judgement(f"p{number}", *order, verdict, "", "j", "")
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
    found = summarise(judgements(verdicts), "one", "other", ALONE)
    assert {name for name in ("wins", "ties", "losses", "unclear") if found[name]} == {counted}
    assert found["contradicting"] == (verdicts == ("first", "first"))


def test_the_win_rate_counts_ties_half():
    """Win, win, loss, tie: (1 + 1 + 0 + ½) / 4. With 0, 0, 1, 1 the squares around 9/16 are 1.71875, of eight."""
    found = summarise(
        judgements(("first", "second"), ("first", "second"), ("second", "first"), ("tie", "tie")), "one", "other", ALONE
    )
    assert found["win_rate"] == 0.625
    assert found["standard_error"] == pytest.approx((8 / 7 * 1.71875) ** 0.5 / 8)


def test_prompts_of_one_conversation_are_one_draw_of_the_win_rate():
    verdicts = judgements(("first", "second"), ("first", "second"), ("second", "first"), ("tie", "tie"))
    prompts = list(dict.fromkeys(each.prompt_id for each in verdicts))
    alone, pairs, one = (
        summarise(verdicts, "one", "other", dict(zip(prompts, numbers, strict=True)))["standard_error"]
        for numbers in (range(4), (0, 0, 1, 1), (0, 0, 0, 0))
    )
    assert alone < pairs
    assert one is None


def test_position_bias_and_agreement_are_kept():
    """Verdicts: 4 first, 3 second, 1 tie; both orders name one winner on the first prompt alone, of four clear ones."""
    found = summarise(
        judgements(
            ("first", "second"), ("first", "first"), ("first", "tie"), ("second", "second"), ("unclear", "first")
        ),
        "one", "other", ALONE,
    )  # fmt: skip
    assert found["agreement"] == 0.25
    assert found["position_bias"] == pytest.approx(4 / 7 - 0.5)
    nothing = summarise(judgements(("unclear", "tie")), "one", "other", ALONE)
    assert nothing["agreement"] is None and nothing["position_bias"] is None


@pytest.mark.slow
def test_a_dead_endpoint_is_named_in_seconds_and_not_asked_for_what_is_known(tmp_path, endpoint):
    url, _, _ = endpoint
    run = made_up_run(tmp_path / "run")
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections and says nothing
    for gone in ("http://127.0.0.1:9/v1", f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "no address"):
        started = time.monotonic()
        with pytest.raises(StageError, match="nothing answers there") as caught:
            judge.run(run, run.config(), "iter_001", "sft", Judge(endpoint=gone, model="j"), limit=9)
        assert gone in str(caught.value) and time.monotonic() - started < 8
    silent.close()
    first = judge.run(run, run.config(), "iter_001", "sft", Judge(endpoint=url, model="j"), limit=9)
    gone = Judge(endpoint="http://127.0.0.1:9/v1", model="j")
    again = judge.run(run, run.config(), "iter_001", "sft", gone, limit=9)
    assert again | {"endpoint": url} == first


@pytest.fixture
def endpoint():
    """Prefers whatever mentions iter_001, and says so in OpenAI's form; remembers what it was asked.

    Its third part says with which status it refuses the n-th question.
    """
    busy: dict[int, int] = {}

    class Handler(BaseHTTPRequestHandler):
        asked: list[dict] = []  # noqa: RUF012

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.asked.append(body | {"path": self.path})
            if len(self.asked) in busy:
                self.send_response(busy[len(self.asked)])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
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
    yield f"http://127.0.0.1:{server.server_port}/v1", Handler.asked, busy
    server.shutdown()
    server.server_close()


def test_every_pair_is_judged_in_both_orders_and_nothing_said_is_lost(tmp_path, endpoint):
    url, asked, _ = endpoint
    run = made_up_run(tmp_path / "run")
    found = judge.run(run, run.config(), "iter_001", "sft", Judge(endpoint=url, model="j"), limit=9)
    assert (found["wins"], found["losses"], found["win_rate"]) == (3, 0, 1.0)
    assert {body["path"] for body in asked} == {"/v1/chat/completions"}
    assert len(asked) == 6
    raw = [json.loads(line) for line in run.storage.read("judgements/iter_001-sft.jsonl").decode().splitlines()]
    assert sorted(line["verdict"] for line in raw) == ["first"] * 3 + ["second"] * 3
    assert all("It could be [[C]]" in line["text"] for line in raw)


def test_the_command_says_in_words_who_won_and_as_json_all_of_it(tmp_path, endpoint, call):
    """Three wins of three: centre (3 + 2) / (3 + 4), the interval ends at 1."""
    url, _, _ = endpoint
    run = made_up_run(tmp_path / "run")
    shutil.copytree(TINY, folder := run.storage.path(run.model(2).path))
    (folder / MANIFEST).write_bytes(Manifest.of(folder_entries(folder), {}, {}).to_bytes())
    words = ["judge", run.storage.root, "--iterates", "latest", "sft", "--endpoint", url, "--model", "j", "--limit", 9]
    code, out, error = call(*words)
    assert (code, error) == (0, "")
    assert out.startswith("iter_001 against sft, judged by j: 3 wins, 0 ties, 0 losses on 3 prompts\nwin rate 1.000")
    found = json.loads(call(*words, "--json")[1])
    assert (found["one"], found["other"], found["wins"], found["judge"]) == ("iter_001", "sft", 3, "j")


def test_the_other_order_of_the_names_asks_nothing_anew_and_is_one_line_of_the_page(tmp_path, endpoint):
    url, asked, _ = endpoint
    run, judged = made_up_run(tmp_path / "run"), Judge(endpoint=url, model="j")
    judge.run(run, run.config(), "iter_001", "sft", judged, limit=9)
    found = judge.run(run, run.config(), "sft", "iter_001", judged, limit=9)
    assert (found["one"], found["wins"], found["losses"], found["win_rate"], len(asked)) == ("sft", 0, 3, 0.0, 6)
    assert [(it.one, it.other, it.win_rate) for it in read_judged(run, [])] == [("iter_001", "sft", 1.0)]


def test_judgements_of_two_commands_at_once_are_all_kept(tmp_path):
    storage = Storage(tmp_path)
    one, other = (judge.Kept(storage, "judgements.jsonl") for _ in range(2))
    for kept, prompt in ((one, "p1"), (other, "p2")):
        kept.add(Judgement(prompt, "sft", "iter-1", "tie", "[[C]]", "j", ""))
        kept.save()
    assert {line["prompt_id"] for line in read_json_lines(storage, "judgements.jsonl")} == {"p1", "p2"}


def test_a_busy_judge_is_asked_again(tmp_path, endpoint):
    """The second question meets 429, its second try 503; six questions in eight requests."""
    url, asked, busy = endpoint
    busy |= {2: 429, 3: 503}
    run = made_up_run(tmp_path / "run")
    judged = Judge(endpoint=url, model="j", parallel=1, wait_s=0.01)
    assert judge.run(run, run.config(), "iter_001", "sft", judged, limit=9)["wins"] == 3
    assert len(asked) == 8


def test_what_was_said_before_a_failure_is_kept_and_not_asked_again(tmp_path, endpoint):
    """The fourth question is refused for good; the same call then asks only the three that are left, of six."""
    url, asked, busy = endpoint
    busy[4] = 400
    run = made_up_run(tmp_path / "run")
    judged = Judge(endpoint=url, model="j", parallel=1, wait_s=0.01)
    with pytest.raises(ConfigError, match="gave no judgement"):
        judge.run(run, run.config(), "iter_001", "sft", judged, limit=9)
    kept = run.storage.read("judgements/iter_001-sft.jsonl").decode().splitlines()
    before = len(asked)
    assert len(kept) >= 3
    assert judge.run(run, run.config(), "iter_001", "sft", judged, limit=9)["wins"] == 3
    assert len(asked) - before == 6 - len(kept)
    again = run.storage.read("judgements/iter_001-sft.jsonl").decode().splitlines()
    assert len(again) == 6 and set(kept) < set(again)
    other = Judge(endpoint=url, model="another", parallel=1)
    judge.run(run, run.config(), "iter_001", "sft", other, limit=9)
    assert len(asked) - before == 6 - len(kept) + 6
    raw = [json.loads(line) for line in run.storage.read("judgements/iter_001-sft.jsonl").decode().splitlines()]
    assert sorted(line["judge"] for line in raw) == ["another"] * 6 + ["j"] * 6


def test_an_endpoint_that_is_not_there_is_an_error(tmp_path):
    run = made_up_run(tmp_path / "run")
    gone = Judge(endpoint="http://user:SECRETSECRET@127.0.0.1:9/v1", model="j", tries=1)
    with pytest.raises(StageError, match="gave no judgement") as caught:
        judge.run(run, run.config(), "iter_001", "sft", gone, limit=1)
    assert "SECRET" not in str(caught.value)


def test_an_iterate_without_samples_is_an_error(tmp_path):
    run = made_up_run(tmp_path / "run", iterations=4, done=1)
    with pytest.raises(ConfigError, match="no held-out samples"):
        judge.run(run, run.config(), "iter_002", "sft", Judge(endpoint="http://x", model="j"), limit=1)
