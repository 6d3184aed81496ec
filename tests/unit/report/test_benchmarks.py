"""Which tasks lm-eval is asked to run, how, and what is kept. On real models: tests/ray and tests/serving."""

import io
import logging
import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from ray.exceptions import WorkerCrashedError
from rich.console import Console

from spin_ray.errors import ConfigError, StageError, UserError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.template_variables import TemplateVariables
from spin_ray.report import benchmarks, harness_warnings
from spin_ray.report.benchmarks import PRESETS, averages, parse_benchmarks, request_for, results_of, split
from spin_ray.report.conditions import in_words
from spin_ray.report.harness import _engine, _shots_of, measure
from spin_ray.report.harness_models import arguments_of, open_model
from spin_ray.report.harness_request import Benchmark, Request
from spin_ray.run_dir.storage import folder_digest
from tests.support.fakes import config_of
from tests.support.made_up_run import TINY, made_up_run
from tests.support.tiny_runs import make_run

MODEL = str(TINY)


def test_tasks_are_names_presets_and_numbers_of_examples():
    assert parse_benchmarks(["gsm8k:8", "mine"]) == (Benchmark("gsm8k", 8), Benchmark("mine", None))
    assert parse_benchmarks(["paper"]) == PRESETS["paper"]
    with pytest.raises(ConfigError, match="gsm8k:many"):
        parse_benchmarks(["gsm8k:many"])
    assert parse_benchmarks(["paper", "gsm8k:5"]) == PRESETS["paper"]
    with pytest.raises(ConfigError, match=r"--tasks: gsm8k with 5 examples and with 8 examples; .* choose one"):
        parse_benchmarks(["paper", "gsm8k:8"])
    with pytest.raises(ConfigError, match="mine with its own number of examples and with 0 examples"):
        parse_benchmarks(["mine", "mine:0"])


def test_the_papers_preset_has_its_numbers_of_examples():
    """Section 6.1: ARC 25, TruthfulQA 0, Winogrande 5, GSM8K 5, HellaSwag 10, MMLU 5."""
    assert [benchmark.shots for benchmark in PRESETS["paper"]] == [25, 0, 5, 5, 10, 5]


def test_a_group_has_its_tasks_number_of_examples():
    """lm-eval tells none of a group of groups, such as mmlu."""
    groups = {"mmlu": ["stem", "other"], "stem": ["a"], "other": ["b", "c"]}
    alike = {"group_subtasks": groups, "n-shot": {"mmlu": None, "stem": 5, "a": 5, "b": 5, "c": 5}}
    assert [_shots_of(task, alike) for task in ("mmlu", "other", "c")] == [5, 5, 5]
    assert _shots_of("mmlu", alike | {"n-shot": {"a": 5, "b": 5, "c": 0}}) is None


ALIKE = {"backend": "hf", "dtype": "float32", "engine": None, "max_length": None, "chat": False}
"""Conditions of every result."""


def test_the_mean_of_the_papers_preset_is_there_once_all_six_are():
    """Six values 0.1 … 0.6, standard errors 0.03: 0.35 ± 0.03 / √6."""

    def result(benchmark: Benchmark, value: float) -> dict:
        metrics = {benchmark.metric: {"value": value, "standard_error": 0.03}, "other": {"value": 9.0}}
        return ALIKE | {"metrics": metrics, "shots": benchmark.shots, "limit": None, "warnings": []}

    results = {it.task: result(it, (place + 1) / 10) for place, it in enumerate(PRESETS["paper"])}
    [mean] = averages(results)["mean of paper"]["metrics"].values()
    assert mean == {"value": pytest.approx(0.35), "standard_error": pytest.approx(0.03 / math.sqrt(6))}
    assert averages(results | {"gsm8k": results["gsm8k"] | {"shots": 8}}) == {}
    assert averages(results | {"mmlu": results["mmlu"] | {"shots": None}}) == {}, "examples that nobody knows"
    assert averages(results | {"gsm8k": results["gsm8k"] | {"limit": 10}}) == {}
    assert averages({"gsm8k": results["gsm8k"]}) == {}
    cut = {"text": "Truncating N tokens", "count": 12, "tasks": ["gsm8k", "winogrande"]}
    warned = {task: results[task] | {"warnings": [cut]} for task in cut["tasks"]}
    assert averages(results | warned)["mean of paper"]["warnings"] == [cut]


def test_an_engines_other_arguments_are_a_condition():
    """They may change every number, as quantised weights do."""
    config = config_of(generation={"engine": {"extra": {"quantization": "fp8"}}})
    said = [_engine(request_for(config, 1, MODEL, benchmarks=(), backend=backend)) for backend in ("hf", "vllm")]
    assert said == [None, "quantization=fp8"]
    assert in_words("gsm8k", ALIKE | {"engine": said[1]}) == "gsm8k, hf, float32, quantization=fp8"


@pytest.mark.parametrize(
    ("others", "why"),
    [
        ({"chat": True}, "its tasks ran with different values of chat"),
        ({"dtype": "bfloat16", "max_length": 2048}, "different values of dtype, max_length"),
        ({"backend": "http://127.0.0.1:8000/v1"}, "different values of backend"),
        ({"engine": "quantization=fp8"}, "different values of engine"),
        ({"limit": 10}, "left out, because gsm8k ran on its first 10 rows"),
        ({"shots": 8}, "left out, because gsm8k ran with 8 examples, not 5"),
        ({"metrics": {}}, "left out, because gsm8k has no exact_match/strict-match"),
    ],
)
def test_a_later_result_of_other_conditions_takes_the_mean_away(tmp_path, monkeypatch, others, why):
    run = made_up_run(tmp_path / "run")
    results = {
        it.task: ALIKE | {"metrics": {it.metric: {"value": 0.5, "standard_error": 0.01}}, "shots": it.shots,
                          "rows": 9, "limit": None, "task_version": 1, "warnings": []}
        for it in PRESETS["paper"]
    }  # fmt: skip
    request = request_for(run.config(), 1, "/m", benchmarks=())
    monkeypatch.setattr(benchmarks, "_measure_on_ray", lambda *_: iter([results]))
    mean = benchmarks.run(run, run.config(), 1, request)["mean of paper"]
    assert mean.items() >= ALIKE.items() and mean["metrics"]["mean"]["value"] == 0.5
    monkeypatch.setattr(benchmarks, "_measure_on_ray", lambda *_: iter([{"gsm8k": results["gsm8k"] | others}]))
    found = benchmarks.run(run, run.config(), 1, request)
    assert "mean of paper" not in found and run.evaluation(1)["benchmarks"] == found
    console = Console(file=io.StringIO(), width=200)
    benchmarks.print_results("iter_000", found, console)
    assert why in console.file.getvalue()


@pytest.mark.parametrize(("chat", "kind"), [(False, "local-completions"), (True, "local-chat-completions")])
def test_an_endpoint_is_asked_for_the_iterate_by_its_name_there(chat, kind):
    """``iter_001`` is ``iter-1`` in the API; questions are no longer than the engine takes."""
    config = config_of(model={"path": "m", "max_length": 3000})
    request = request_for(config, 2, "/m", benchmarks=(), endpoint="http://localhost:8000/v1/", chat=chat)
    found, arguments = arguments_of(request)
    assert (found, arguments["model"], arguments["max_length"]) == (kind, "iter-1", 3000)
    assert arguments["base_url"] == f"http://localhost:8000/v1/{'chat/' if chat else ''}completions"


def test_an_engine_of_the_tasks_is_one_of_the_run(monkeypatch):
    engine = {"enforce_eager": True, "tensor_parallel_size": 2, "extra": {"block_size": 32}}
    config = config_of(generation={"engine": engine, "resources": {"cpus": 3, "gpus": 2}}, train={"precision": "fp32"})
    request = request_for(config, 1, MODEL, benchmarks=(), backend="vllm")
    kind, arguments = arguments_of(request)
    assert (kind, request.name, request.threads, arguments["dtype"]) == ("vllm", "iter_000", 3, "float32")
    expected = {"enforce_eager": True, "tensor_parallel_size": 2, "block_size": 32, "generation_config": "vllm"}
    assert arguments == arguments | expected
    assert "max_length" not in arguments


def test_an_engine_of_the_tasks_has_the_runs_stages_and_on_cpu_whole_prompts():
    """It omitted both: half of the GPUs idled, and on a CPU vLLM can die of a prompt in pieces."""
    engine = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    config = config_of(generation={"engine": engine, "resources": {"gpus": 4}})
    arguments = arguments_of(request_for(config, 1, MODEL, benchmarks=(), backend="vllm", chat=True))[1]
    assert arguments == arguments | engine | {"distributed_executor_backend": "mp"}
    config = config_of(model={"path": "m", "max_length": 3000})
    request = replace(request_for(config, 1, MODEL, benchmarks=(), backend="vllm"), max_length=3000)
    arguments = arguments_of(request)[1]
    expected = {"max_length": 3000, "enable_chunked_prefill": False, "max_num_batched_tokens": 3000}
    assert arguments == arguments | expected


@pytest.mark.slow
def test_the_chat_template_has_the_runs_variables_and_date():
    """lm-eval itself would give the backend vllm no variable enable_thinking (0.4.13)."""
    folder = resolve("embedded:tiny-llama")
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ enable_thinking }}"
        "{{ strftime_now(' %d %b %Y ') }}" + (Path(folder) / "chat_template.jinja").read_text()
    )
    variables = TemplateVariables({"enable_thinking": False}, datetime(2024, 7, 26))
    asked = {"benchmarks": (), "chat": True, "variables": variables, "chat_template": template}
    request = request_for(config_of(), 1, folder, **asked)
    model = open_model(*arguments_of(request), request)
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    with harness_warnings.counted() as texts:
        found = model.apply_chat_template(said)
    assert found == "False 26 Jul 2024 <|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == {"the chat template refuses the system message, which is left out": 1}
    assert model.apply_chat_template(said, add_generation_prompt=False) == "False 26 Jul 2024 <|im_start|>user\nWhy?"


def test_the_start_model_is_asked_by_the_recipes_template(tmp_path, monkeypatch):
    """Its folder has its own template, or none; the folders of trained iterates have the recipe's.

    Without a chat only the template's end of turn is asked for, and a file that is gone is no trouble.
    """
    run, file = made_up_run(tmp_path / "run"), tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    config = run.config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"chat_template": str(file)})})
    asked = []
    monkeypatch.setattr(
        benchmarks, "_measure_on_ray", lambda _run, _iterate, request, _config: asked.append(request) or []
    )
    for chat in (True, False):
        benchmarks.run(run, config, 0, request_for(config, 0, "/m", benchmarks=(), chat=chat))
    file.unlink()
    benchmarks.run(run, config, 0, request_for(config, 0, "/m", benchmarks=(), chat=False))
    assert [request.chat_template for request in asked] == ["{{ messages }}", "{{ messages }}", None]


@pytest.mark.slow
def test_benchmarks_are_dealt_out_to_the_runs_workers():
    request = request_for(config_of(), 0, "/m", benchmarks=PRESETS["paper"])
    parts = [part.benchmarks for part in split(request, 4)]
    assert [len(part) for part in parts] == [2, 2, 1, 1]
    assert {it for part in parts for it in part} == set(PRESETS["paper"])
    assert split(request, 1) == [request] and len(split(request, 99)) == 6


def test_results_are_kept_though_another_task_fails(tmp_path, monkeypatch):
    run = made_up_run(tmp_path / "run")
    result = {"metrics": {"acc": {"value": 0.5, "standard_error": None}}, "shots": 0, "limit": None, "warnings": []}

    def parts(*_):
        yield {"one": result}
        raise StageError("lm-eval failed on sft, --tasks two: out of memory")

    monkeypatch.setattr(benchmarks, "_measure_on_ray", parts)
    request = request_for(run.config(), 0, "/m", benchmarks=parse_benchmarks(["one", "two"]))
    with pytest.raises(StageError, match="--tasks two: out of memory"):
        benchmarks.run(run, run.config(), 0, request)
    assert run.evaluation(0)["benchmarks"]["one"] == result


def test_warnings_about_numbers_are_counted_alike_but_for_their_numbers():
    """Those of tasks and settings, and what comes afterwards, are not counted. Credentials are hidden."""
    with harness_warnings.counted() as texts:
        for length in (18, 20):
            logging.getLogger("lm_eval.models.huggingface").warning("context (%d)\n exceeds (16)", length)
        logging.getLogger("lm_eval.utils").warning("at http://me:SECRET@host/")
        logging.getLogger("lm_eval.models.huggingface").info("loaded 3")
        logging.getLogger("lm_eval.evaluator").warning("Overwriting default num_fewshot")
        logging.getLogger("lm_eval.models.api_models").warning("API request failed! Status code: 503. Retrying...")
    logging.getLogger("lm_eval.models.huggingface").warning("context (18) exceeds (16)")
    assert texts == {"context (N) exceeds (N)": 2, "at http://[hidden]@host/": 1}
    once = {"text": "at http://[hidden]@host/", "count": 1, "tasks": ["mine"]}
    results = [{"warnings": harness_warnings.warned(texts, ["mine"])}, {"warnings": [once]}]
    assert list(harness_warnings.sentences(results)) == [
        "mine: lm-eval warned 2 times: context (N) exceeds (N)", "mine: lm-eval warned once: at http://[hidden]@host/"
    ]  # fmt: skip


def test_results_of_two_commands_at_once_are_both_kept(tmp_path, monkeypatch):
    run, averages, others = made_up_run(tmp_path / "run"), benchmarks.averages, iter(["two"])

    def overtaken(results):
        for task in others:
            benchmarks._keep(run, 0, {task: {"metrics": {}}})
        return averages(results)

    monkeypatch.setattr(benchmarks, "averages", overtaken)
    assert benchmarks._keep(run, 0, {"one": {"metrics": {}}}).keys() == {"one", "two"}
    assert run.evaluation(0)["benchmarks"].keys() == {"one", "two"}


def test_failed_parts_are_told_together_after_the_others():
    """What the user must mend decides the kind of error."""
    request = request_for(config_of(), 0, "/m", benchmarks=parse_benchmarks(["one", "two", "three"]))
    one, two, three = split(request, 3)
    found = []

    def ended(*parts):
        found.clear()
        for each in results_of(parts):
            found.append(each)

    with pytest.raises(StageError, match=r"sft, --tasks one: no memory; .*sft, --tasks three: no disk"):
        ended((one, RuntimeError("no memory")), (two, {"two": 1}), (three, RuntimeError("no disk")))
    assert found == [{"two": 1}]
    unknown = ConfigError("--tasks: lm-eval knows no one")
    with pytest.raises(UserError, match=r"knows no one; lm-eval failed on sft, --tasks three: no disk"):
        ended((one, unknown), (three, RuntimeError("no disk")), (two, {"two": 1}))
    assert found == [{"two": 1}]


@pytest.mark.parametrize(
    ("backend", "error", "said"),
    [
        ("vllm", WorkerCrashedError(), "a process was killed by the system or crashed"),
        (
            "vllm",
            RuntimeError("CUDA out of memory"),
            "CUDA out of memory; memory ran out: lower --max-length, generation.",
        ),
        ("hf", RuntimeError("CUDA out of memory"), "CUDA out of memory; memory ran out: lower --max-length or train."),
    ],
)
def test_a_part_without_memory_is_told_with_its_settings(backend, error, said):
    request = request_for(config_of(), 0, "/m", benchmarks=parse_benchmarks(["one"]), backend=backend)
    with pytest.raises(StageError) as caught:
        list(results_of([(request, error)]))
    assert str(caught.value).startswith(f"lm-eval failed on sft, --tasks one: {said}")
    assert "python-core-worker" not in str(caught.value)


def test_a_dead_endpoint_is_named_before_lm_eval_starts(tmp_path):
    run = made_up_run(tmp_path / "run")
    request = request_for(run.config(), 0, "/m", benchmarks=(), endpoint="http://me:SECRET@127.0.0.1:9/v1")
    with pytest.raises(StageError, match=r"127\.0\.0\.1:9/v1: nothing answers there") as caught:
        benchmarks.run(run, run.config(), 0, request)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("owner", ["spin_ray", "vllm"])
def test_a_server_of_another_run_is_no_endpoint_of_this_one(tmp_path, monkeypatch, owner):
    """Other servers say nothing of what they serve."""
    run = make_run(tmp_path / "run", 1)
    own, asked = folder_digest(run.model(1).manifest().files), []
    request = request_for(run.config(), 1, "/m", benchmarks=(), endpoint="http://h/v1")
    monkeypatch.setattr(benchmarks, "unreachable", lambda endpoint: None)
    monkeypatch.setattr(benchmarks, "measure", lambda request: asked.append(request) or {})
    monkeypatch.setattr(benchmarks, "card_of", lambda *_: {"owned_by": owner, "digest": own})
    benchmarks.run(run, run.config(), 1, request)
    monkeypatch.setattr(benchmarks, "card_of", lambda *_: {"owned_by": owner, "digest": "0" * 64})
    if owner == "spin_ray":
        with pytest.raises(ConfigError, match=r"http://h/v1: its iter-0 is not that of .*run \(digest 00000000…"):
            benchmarks.run(run, run.config(), 1, request)
    else:
        benchmarks.run(run, run.config(), 1, request)
    assert len(asked) == (1 if owner == "spin_ray" else 2)


@pytest.mark.slow
def test_the_presets_are_tasks_that_lm_eval_has():
    tasks = pytest.importorskip("lm_eval.tasks").TaskManager().all_tasks
    assert {benchmark.task for preset in PRESETS.values() for benchmark in preset} <= set(tasks)


@pytest.mark.slow
def test_an_unknown_task_is_an_error_that_names_it():
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="knows no no_such_task"):
        measure(Request(model="m", name="sft", benchmarks=(Benchmark("no_such_task"),)))


def test_a_folder_of_tasks_that_is_not_there_is_an_error_before_anything_runs(call, tmp_path):
    run = made_up_run(tmp_path / "run")
    code, _, error = call("eval", run.storage.root, "--iterate", "sft", "--tasks", "mine", "--include", tmp_path / "no")
    assert (code, error.strip()) == (2, f"error: --include {tmp_path / 'no'}: there is no such folder")
    assert "benchmarks" not in run.storage.read("sft/eval.json").decode()
