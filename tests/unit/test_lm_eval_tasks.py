"""lm-eval on an iterate, and beside our own grading of the same rows."""

import json
from pathlib import Path

import pytest

from spin_ray.answers import is_correct
from spin_ray.embedded import resolve
from spin_ray.errors import ConfigError
from spin_ray.lm_eval_tasks import PRESETS, Benchmark, Request, _model, measure, parse_benchmarks

TASKS = Path(__file__).parent / "tasks"


def test_tasks_are_names_presets_and_numbers_of_examples():
    assert parse_benchmarks(["gsm8k:8", "mine"]) == (Benchmark("gsm8k", 8), Benchmark("mine", None))
    assert parse_benchmarks(["paper"]) == PRESETS["paper"]
    with pytest.raises(ConfigError, match="gsm8k:many"):
        parse_benchmarks(["gsm8k:many"])


def test_the_papers_preset_has_its_numbers_of_examples():
    """Section 6.1: ARC 25, TruthfulQA 0, Winogrande 5, GSM8K 5, HellaSwag 10, MMLU 5."""
    assert [benchmark.shots for benchmark in PRESETS["paper"]] == [25, 0, 5, 5, 10, 5]


def test_an_endpoint_is_asked_for_the_iterate_by_name():
    request = Request(model="/m", name="iter_001", benchmarks=(), endpoint="http://localhost:8000/v1/")
    kind, arguments = _model(request)
    assert (kind, arguments["model"]) == ("local-completions", "iter_001")
    assert arguments["base_url"] == "http://localhost:8000/v1/completions"


@pytest.mark.slow
def test_the_presets_are_tasks_that_lm_eval_has():
    tasks = pytest.importorskip("lm_eval.tasks").TaskManager().all_tasks
    assert {benchmark.task for preset in PRESETS.values() for benchmark in preset} <= set(tasks)


@pytest.mark.slow
def test_an_unknown_task_is_an_error_that_names_it():
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="knows no no_such_task"):
        measure(Request(model="m", name="sft", benchmarks=(Benchmark("no_such_task"),)))


@pytest.mark.slow
def test_a_local_task_gives_the_accuracy_of_our_own_grading(tmp_path, monkeypatch):
    """SmolLM2-135M goes on with "7 + 6"; neither all right nor all wrong."""
    pytest.importorskip("lm_eval")
    model = resolve("embedded:smollm2-135m-instruct")
    rows = [
        {"prompt": f"2 + 2 = 4\n3 + 5 = 8\n10 + 4 = 14\n{a} + {b}", "answer": a + b}
        for a, b in [(1, 1), (7, 6), (12, 9), (48, 77), (3, 2), (365, 986), (20, 20), (517, 268)]
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text((TASKS / "sums.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    request = Request(model=model, name="sft", benchmarks=(Benchmark("spin_ray_sums", 0),), include=str(tmp_path))
    found = measure(request)["spin_ray_sums"]
    accuracy = found["metrics"]["exact_match/number"]
    ours = [is_correct(text, row["answer"], "equals") for text, row in zip(greedy(model, rows), rows, strict=True)]
    assert accuracy["value"] == pytest.approx(sum(ours) / len(ours))
    assert 0 < accuracy["value"] < 1
    assert accuracy["standard_error"] > 0
    assert (found["rows"], found["shots"], found["task_version"]) == (8, 0, 1.0)


def greedy(model: str, rows: list[dict]) -> list[str]:
    """Each prompt on its own, eight tokens, up to the end of the line."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    texts = []
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            out = network.generate(**ids, max_new_tokens=8, do_sample=False)
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :]).partition("\n")[0])
    return texts
