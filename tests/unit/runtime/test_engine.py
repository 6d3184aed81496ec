"""What vLLM is told, and what is kept of its answer. The real one is in tests/e2e; here a module of its name acts."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from spin_ray.config import recipe
from spin_ray.config.sections import EngineConfig, SamplingConfig
from spin_ray.errors import ConfigError
from spin_ray.inputs.embedded import resolve
from spin_ray.runtime import cpu, gpu
from spin_ray.runtime import engine as engine_module
from spin_ray.runtime.engine import (
    FLASHINFER_SAMPLER,
    Completion,
    EngineSpec,
    VllmEngine,
    _completion,
    platform,
    vllm_environment,
)
from tests.support.fakes import config_of

MODEL = resolve("embedded:tiny-llama")


@pytest.fixture
def vllm(monkeypatch):
    """Records what it is given; answers [11, 2] to every prompt."""
    told: dict[str, Any] = {"is_cpu": True, "generate": [], "shut_down": False}

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            told["arguments"] = arguments
            told["environment"] = dict(os.environ)
            core = SimpleNamespace(shutdown=lambda: told.update(shut_down=True))
            self.llm_engine = SimpleNamespace(engine_core=core)

        def reset_prefix_cache(self) -> bool:
            told["generate"].append("reset")
            return told.get("resets", True)

        def generate(self, prompts: Any, params: Any, **options: Any) -> list[Any]:
            told["generate"].append((prompts, params, options))
            logps = [None if asked["logprobs"] is None else -1.5 for asked in params]
            answers = [
                SimpleNamespace(token_ids=(11, 2), finish_reason="stop", cumulative_logprob=logp) for logp in logps
            ]
            return [SimpleNamespace(outputs=[answer]) for answer in answers]

    class Platform:
        is_cpu = staticmethod(lambda: told["is_cpu"])
        device_type = property(lambda _: "cpu" if told["is_cpu"] else "cuda")

    module, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    module.__dict__.update(LLM=LLM, SamplingParams=lambda **values: values, TokensPrompt=lambda **values: values)
    platforms.__dict__.update(current_platform=Platform())
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(cpu, "allow_amx_kernels", lambda: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return told


def spec_of(max_length: int = 512, trust_remote_code: bool = False, **engine: Any) -> EngineSpec:
    return EngineSpec(
        model=MODEL,
        max_length=max_length,
        stop_token_id=2,
        threads=3,
        config=EngineConfig(**engine),
        trust_remote_code=trust_remote_code,
    )


# Starting


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, None),
        ({"tensor_parallel_size": 4}, "mp"),
        ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, "ray"),
    ],
)
def test_an_engine_of_one_node_has_processes_and_one_of_several_has_ray(vllm, sizes, expected):
    vllm["is_cpu"] = False
    VllmEngine(spec_of(**sizes))
    assert vllm["arguments"].get("distributed_executor_backend") == expected
    assert vllm["arguments"]["pipeline_parallel_size"] == sizes.get("pipeline_parallel_size", 1)


def test_on_gpus_prefixes_are_cached_within_a_call_and_forgotten_before_each(vllm):
    vllm["is_cpu"] = False
    engine = VllmEngine(spec_of())
    assert vllm["arguments"]["enable_prefix_caching"] is True
    for _ in range(2):
        engine.generate([[5]], SamplingConfig(), [1])
    assert [call == "reset" for call in vllm["generate"]] == [True, False, True, False]
    vllm["resets"] = False
    with pytest.raises(RuntimeError, match="could not empty its prefix cache"):
        engine.generate([[5]], SamplingConfig(), [1])


def test_memory_of_the_cards_is_waited_for_before_vllm_starts(vllm, monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(engine_module, "wait_for_memory", lambda *given: asked.append((given, "arguments" in vllm)))
    VllmEngine(spec_of())
    assert asked == [], "on CPU there is no card"
    del vllm["arguments"]
    vllm["is_cpu"] = False
    VllmEngine(spec_of(gpu_memory_utilization=0.4, tensor_parallel_size=2))
    assert asked == [((0.4, "generation.engine.gpu_memory_utilization", 2), False)]


def test_engines_that_share_a_card_wait_for_memory_and_start_alone(vllm, monkeypatch):
    """vLLM takes what another allocates meanwhile for its own."""
    happened: list[Any] = []

    @contextmanager
    def alone(*given: Any) -> Iterator[None]:
        happened.append(given)
        yield
        happened.append("arguments" in vllm)

    monkeypatch.setattr(engine_module, "alone_on_card", alone)
    monkeypatch.setattr(engine_module, "wait_for_memory", lambda *_: happened.append("memory"))
    vllm["is_cpu"] = False
    VllmEngine(replace(spec_of(), gpus=0.5, start_timeout_s=7))
    assert happened == [(0.5, "generation", 7), "memory", True]


def test_a_node_without_tools_to_compile_is_told_before_its_engine_starts(vllm, monkeypatch):
    monkeypatch.setattr(gpu, "missing_tools", lambda: "Python.h")
    VllmEngine(spec_of())
    vllm["is_cpu"] = False
    with pytest.raises(ConfigError, match=rf"{socket.gethostname()} lacks Python\.h"):
        VllmEngine(spec_of())


def test_vllm_is_started_with_these_arguments_and_no_others(vllm):
    """Sampling never comes from the model folder, nothing is cached between calls, and only safetensors are read."""
    VllmEngine(spec_of(dtype="bfloat16", max_num_seqs=64, enforce_eager=True))
    assert vllm["arguments"] == {
        "model": str(MODEL), "max_model_len": 512, "dtype": "bfloat16", "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "max_num_seqs": 64, "gpu_memory_utilization": 0.9, "enforce_eager": True, "trust_remote_code": False,
        "generation_config": "vllm", "enable_prefix_caching": False, "skip_tokenizer_init": True,
        "load_format": "safetensors", "config_format": "hf", "seed": 0, "logprobs_mode": "raw_logprobs",
        "enable_chunked_prefill": False, "max_num_batched_tokens": 2048,
    }  # fmt: skip


def test_every_answer_of_an_adapters_engine_is_of_the_adapter(vllm, monkeypatch):
    """vLLM makes room for ranks of 8, 16, 32, …; θ_0 has no adapter, but an engine that would load one."""
    request = ModuleType("vllm.lora.request")
    request.__dict__.update(LoRARequest=lambda *given: given)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    engine = VllmEngine(replace(spec_of(), adapter=Path("/run/iter_000/adapter"), adapter_rank=12))
    assert vllm["arguments"] | {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16} == vllm["arguments"]
    engine.generate([[5]], SamplingConfig(), [1])
    ((_, _, options),) = vllm["generate"]
    assert options["lora_request"] == ("adapter", 1, "/run/iter_000/adapter")
    VllmEngine(replace(spec_of(), adapter_rank=12)).generate([[5]], SamplingConfig(), [1])
    assert vllm["arguments"]["enable_lora"] and "lora_request" not in vllm["generate"][-1][2]


def test_on_cpu_a_prompt_of_any_length_is_prefilled_whole(vllm):
    VllmEngine(spec_of(max_length=8192))
    assert vllm["arguments"]["enable_chunked_prefill"] is False
    assert vllm["arguments"]["max_num_batched_tokens"] == 8192


def test_on_gpus_vllm_schedules_prefill_as_it_likes(vllm):
    vllm["is_cpu"] = False
    VllmEngine(spec_of())
    assert not {"enable_chunked_prefill", "max_num_batched_tokens"} & vllm["arguments"].keys()


def test_other_arguments_are_passed_on_as_they_are(vllm):
    VllmEngine(spec_of(extra={"kv_cache_dtype": "fp8", "block_size": 32}))
    assert (vllm["arguments"]["kv_cache_dtype"], vllm["arguments"]["block_size"]) == ("fp8", 32)


def test_code_of_the_model_is_trusted_only_if_the_config_says_so(vllm):
    VllmEngine(spec_of(trust_remote_code=True))
    assert vllm["arguments"]["trust_remote_code"] is True


def test_the_scheduler_runs_in_this_process_with_its_threads_and_memory(vllm):
    VllmEngine(spec_of(cpu_kv_cache_gib=5))
    environment = vllm["environment"]
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "5"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        (FLASHINFER_SAMPLER, None, "0"), (FLASHINFER_SAMPLER, "1", "1"),
        ("VLLM_LOGGING_LEVEL", None, "WARNING"), ("VLLM_LOGGING_LEVEL", "DEBUG", "DEBUG"),
        ("VLLM_NO_USAGE_STATS", None, "1"), ("VLLM_NO_USAGE_STATS", "0", "0"),
    ],
)  # fmt: skip
def test_what_the_user_says_to_vllm_counts_and_else_no_engine_needs_nvcc(vllm, monkeypatch, name, own, expected):
    """vLLM 0.29 builds FlashInfer's sampler with nvcc as it starts, on any card that could run it."""
    monkeypatch.delitem(os.environ, name, raising=False)
    if own:
        monkeypatch.setitem(os.environ, name, own)
    VllmEngine(spec_of())
    assert vllm["environment"][name] == vllm_environment(EngineConfig())[name] == expected


def test_vllm_knows_each_variable_that_it_gets():
    """It reads a name that it does not know as if nothing was set."""
    from vllm.envs import environment_variables

    assert [name for name in vllm_environment(EngineConfig()) if name not in environment_variables] == []


# Generating


def test_sampling_is_exactly_what_the_config_says(vllm):
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, top_k=40, max_tokens=100)
    VllmEngine(spec_of()).generate([[5, 6]], sampling, [123])
    ((prompts, (params,), _),) = vllm["generate"]
    assert prompts == [{"prompt_token_ids": [5, 6]}]
    assert params == {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 100, "seed": 123, "stop_token_ids": [2],
        "detokenize": False, "logprobs": None,
    }  # fmt: skip


def test_by_default_the_opponent_itself_is_sampled(vllm):
    """Temperature 1, the whole distribution."""
    VllmEngine(spec_of()).generate([[5]], config_of().generation.sampling, [0])
    ((_, (params,), _),) = vllm["generate"]
    assert (params["temperature"], params["top_p"], params["top_k"]) == (1.0, 1.0, 0)


def test_a_response_never_goes_past_the_models_length(vllm):
    """512 − 500 = 12 tokens are left; the longest prompt leaves one."""
    sampling = SamplingConfig(max_tokens=100)
    VllmEngine(spec_of()).generate([[5] * 500, [5] * 511, [5]], sampling, [0, 1, 2])
    ((_, params, _),) = vllm["generate"]
    assert [values["max_tokens"] for values in params] == [12, 1, 100]


def test_all_rows_of_a_call_are_queued_at_once_each_with_its_own_seed(vllm):
    found = VllmEngine(spec_of()).generate([[5], [6], [7]], SamplingConfig(), [1, 2, 3])
    ((prompts, params, options),) = vllm["generate"]
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [[5], [6], [7]]
    assert [values["seed"] for values in params] == [1, 2, 3]
    assert options == {"use_tqdm": False}
    assert [completion.token_ids for completion in found] == [[11, 2]] * 3


def test_log_p_is_asked_for_the_audited_rows_alone(vllm):
    found = VllmEngine(spec_of()).generate([[5], [6], [7]], SamplingConfig(), [1, 2, 3], audited=2)
    ((_, params, _),) = vllm["generate"]
    assert [values["logprobs"] for values in params] == [0, 0, None]
    assert [completion.logp for completion in found] == [-1.5, -1.5, None]


def test_a_seed_for_each_prompt_is_needed(vllm):
    with pytest.raises(ValueError, match="shorter"):
        VllmEngine(spec_of()).generate([[5], [6]], SamplingConfig(), [1])


def test_closing_shuts_the_engine_down(vllm):
    VllmEngine(spec_of()).close()
    assert vllm["shut_down"]


# Completions


@pytest.mark.parametrize(("tokens", "reason"), [([11, 12, 2], "stop"), ([11, 12], "length"), ([], "length")])
def test_tokens_and_reason_are_kept_as_the_engine_gave_them(tokens, reason):
    output = SimpleNamespace(token_ids=tuple(tokens), finish_reason=reason, cumulative_logprob=None)
    assert _completion(output) == Completion(tokens, reason)


@pytest.mark.parametrize("reason", ["abort", "error", None, "repetition"])
def test_a_response_that_ended_in_any_other_way_is_an_error(reason):
    with pytest.raises(RuntimeError, match="expected stop or length"):
        _completion(SimpleNamespace(token_ids=(1,), finish_reason=reason))


def test_what_every_engine_is_told_is_what_a_recipes_extra_may_not_say():
    arguments = engine_module.engine_arguments(
        Path(MODEL), EngineConfig(), max_length=64, dtype="float32", trust_remote_code=False, on_cpu=False, own={}
    )
    assert set(arguments) == recipe._OWN_ARGUMENTS


def test_a_vllm_that_cannot_be_imported_is_told_with_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    with pytest.raises(ConfigError, match=rf"vLLM cannot be imported on {socket.gethostname()} \(.*vllm.*\); pip"):
        platform()
