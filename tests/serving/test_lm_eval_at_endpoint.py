"""lm-eval asks the real server through OpenAI's API: likelihoods, completions and chat."""

import json
from pathlib import Path

import pytest

from tests.support.served import Served

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")
from spin_ray.errors import ConfigError
from spin_ray.report import benchmarks
from spin_ray.report.benchmarks import parse_benchmarks
from spin_ray.report.harness_request import Request
from tests.support.lm_eval_cases import CHOICES, Plain, write_task

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROMPTS = ["2 + 3 =", "Hello", "17 + 4 =", "yes or no"]
GREEDY = {"temperature": 0, "max_tokens": 8, "stop": ["\n"]}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def ask(served: Served, folder: Path, task: str, *, chat: bool = False) -> dict:
    """Runs a task on ``sft`` and gives what is in its eval.json afterwards."""
    run = served.run
    request = benchmarks.request_for(
        run.config(), 0, run.description()["start_model"], endpoint=f"{served.url}/v1", include=str(folder), chat=chat,
        benchmarks=parse_benchmarks([f"{task}:0"]),
    )  # fmt: skip
    benchmarks.run(run, run.config(), 0, request)
    return json.loads(run.storage.read("sft/eval.json"))["benchmarks"][task]


def test_likelihoods_at_the_endpoint_choose_as_transformers_does(served: Served, tmp_path: Path) -> None:
    write_task(tmp_path, "choices", CHOICES)
    expected = Plain(served.run.description()["start_model"]).choice_accuracy()
    found = ask(served, tmp_path, "spin_ray_choices")
    assert found["metrics"]["acc"]["value"] == pytest.approx(expected)
    assert (found["rows"], found["backend"]) == (len(CHOICES), f"{served.url}/v1")


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_answers_are_those_that_the_openai_client_gets(served: Served, tmp_path: Path, chat: bool) -> None:
    """Every second row asks for what the model says, the others for something else: one half is right."""
    client, plain = served.client(), Plain(served.run.description()["start_model"])
    said = []
    for prompt in PROMPTS:
        if chat:
            messages = [{"role": "user", "content": prompt}]
            said.append(
                client.chat.completions.create(model="sft", messages=messages, **GREEDY).choices[0].message.content
            )
        else:
            said.append(client.completions.create(model="sft", prompt=plain.ids(prompt), **GREEDY).choices[0].text)
    rows = [
        {"prompt": prompt, "answer": text if number % 2 else f"not {text}"}
        for number, (prompt, text) in enumerate(zip(PROMPTS, said, strict=True))
    ]
    write_task(tmp_path, "echoes", rows)
    found = ask(served, tmp_path, "spin_ray_echoes", chat=chat)
    assert found["metrics"]["exact_match"]["value"] == 0.5
    assert found["chat"] is chat


def test_a_model_that_does_not_serve_is_an_error_in_one_line(served: Served, tmp_path: Path) -> None:
    write_task(tmp_path, "echoes", [{"prompt": "a", "answer": "b"}])
    request = Request(
        model=served.run.description()["start_model"], name="iter-7", endpoint=f"{served.url}/v1", max_length=256,
        include=str(tmp_path), benchmarks=parse_benchmarks(["spin_ray_echoes:0"]),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="lm-eval failed on iter-7") as raised:
        benchmarks.run(served.run, served.run.config(), 0, request)
    assert "\n" not in str(raised.value)
