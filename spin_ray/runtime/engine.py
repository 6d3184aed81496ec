"""Engines: token ids in, sampled token ids out."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from spin_ray.config.packages import install_command
from spin_ray.config.sections import EngineConfig, SamplingConfig
from spin_ray.errors import ConfigError
from spin_ray.runtime import cpu
from spin_ray.runtime.garbage import skip_imports
from spin_ray.runtime.gpu import check_triton
from spin_ray.runtime.gpu_memory import wait_for_memory
from spin_ray.runtime.root_cause import root_cause_told
from spin_ray.runtime.shared_cards import alone_on_card

FLASHINFER_SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"
"""Switch of a sampler that vLLM 0.29 builds with nvcc as it starts, also where no request uses it (vllm#49497).
Seeded requests never do."""
_MEMORY_SETTING = "generation.engine.gpu_memory_utilization"


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled response, with the end-of-turn token only if the engine stopped on it."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logp: float | None = None
    """Log-probability in nats, at temperature 1 and over the whole vocabulary, if asked for. It checks the engine and
    is never a reference."""


class GenerationEngine(Protocol):
    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int], *, audited: int = 0
    ) -> list[Completion]:
        """Returns one response per prompt, in order; equal arguments give equal responses.

        Args:
            audited: number of first prompts whose responses get ``logp``, if the engine knows it.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    model: Path
    max_length: int
    stop_token_id: int
    """End-of-turn token of the chat template."""
    other_stop_ids: tuple[int, ...] = ()
    """Other tokens that end a response."""
    threads: int
    config: EngineConfig
    gpus: float = 0
    """GPUs of one engine; a fraction is a share of a card."""
    start_timeout_s: float = 900
    """Longest wait for other engines that start on the same card."""
    trust_remote_code: bool = False
    adapter: Path | None = None
    adapter_rank: int | None = None
    """Rank of adapters that the engine has room for. Set for θ_0 too, so that a model whose adapters vLLM cannot load
    fails before training."""


StartEngine = Callable[[EngineSpec], GenerationEngine]


class VllmEngine:
    """vLLM, started from a model folder.

    - The folder's generation_config.json is not read.
    - The scheduler runs in this process and the prefix cache is emptied before each call: neither timing nor earlier
      calls change a response. Samples of one prompt share its prefill. On CPU there is no cache.
    - On CPU prompts are prefilled whole: vLLM 0.29-0.32 otherwise dies on seeded requests ("CPU Generator does not use
      offset").
    - Each iterate gets a new engine: on CPU ``reload_weights`` keeps the old LM head.
    """

    def __init__(self, spec: EngineSpec) -> None:
        prepare_process(spec.config, spec.threads)

        check_platform(platform(), spec.config.devices if spec.config.pipeline_parallel_size > 1 else _given_gpus())
        with _importing():
            from vllm import LLM
            from vllm.platforms import current_platform

        skip_imports()
        self._spec = spec
        arguments = engine_arguments(
            spec.model,
            spec.config,
            max_length=spec.max_length,
            dtype=spec.config.dtype,
            trust_remote_code=spec.trust_remote_code,
            on_cpu=current_platform.is_cpu(),
            own={
                "enable_prefix_caching": not current_platform.is_cpu(),
                "skip_tokenizer_init": True,
                "seed": 0,
                "logprobs_mode": "raw_logprobs",  # before temperature, top_p and top_k
                **(lora_arguments(spec.adapter_rank) if spec.adapter_rank else {}),
                **_executor(spec.config),
            },
        )
        if not current_platform.is_cpu():
            check_triton("generation.resources.gpus")  # a node of a cluster has tools of its own
        with alone_on_card(spec.gpus, "generation", spec.start_timeout_s):
            if not current_platform.is_cpu():
                wait_for_memory(arguments["gpu_memory_utilization"], _MEMORY_SETTING, spec.config.devices)
            with root_cause_told():
                self._llm: Any = LLM(**arguments)
        self._has_cache: bool = arguments["enable_prefix_caching"]
        self._of_each_call: dict[str, Any] = {"use_tqdm": False}
        if spec.adapter:
            from vllm.lora.request import LoRARequest

            self._of_each_call["lora_request"] = LoRARequest("adapter", 1, str(spec.adapter))

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int], *, audited: int = 0
    ) -> list[Completion]:
        from vllm import SamplingParams, TokensPrompt

        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=min(sampling.max_tokens, self._spec.max_length - len(prompt)),
                seed=seed,
                stop_token_ids=[self._spec.stop_token_id, *self._spec.other_stop_ids],
                detokenize=False,
                logprobs=0 if number < audited else None,
            )
            for number, (prompt, seed) in enumerate(zip(prompt_ids, seeds, strict=True))
        ]
        if self._has_cache and not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not empty its prefix cache: requests of an earlier call are still running")
        prompts = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompt_ids]
        outputs = self._llm.generate(prompts, params, **self._of_each_call)
        return [_completion(output.outputs[0]) for output in outputs]

    def close(self) -> None:
        core = self._llm.llm_engine.engine_core
        core.shutdown()
        del self._llm


def vllm_environment(config: EngineConfig) -> dict[str, str]:
    """Returns vLLM's environment. The user's own logging level, usage statistics and sampler stay."""
    unless_set = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", FLASHINFER_SAMPLER: "0"}
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(config.cpu_kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **{name: os.environ.get(name, value) for name, value in unless_set.items()},
    }


def prepare_process(config: EngineConfig, threads: int) -> None:
    """Sets vLLM's environment; call it before vLLM is imported."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | vllm_environment(config)
    cpu.prepare(threads)
    cpu.allow_amx_kernels()


@contextmanager
def _importing() -> Iterator[None]:
    """Raises ConfigError if vLLM cannot be imported. Nodes of a cluster have environments of their own."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"generation: vLLM cannot be imported on {socket.gethostname()} ({error}); {install_command('gpu')} there, "
            f"or {install_command('cpu')} on machines without GPUs"
        ) from error


def platform() -> str:
    """Returns vLLM's platform, ``cpu`` or ``cuda``; empty if it found none.

    Raises:
        ConfigError: vLLM cannot be imported.
    """
    with _importing():
        from vllm.platforms import current_platform

    return current_platform.device_type


def check_platform(platform: str, gpus: int | None) -> None:
    """Checks that vLLM computes on what Ray gave to this process; None stands for a process without Ray.

    Raises:
        ConfigError: a build for CPUs got GPUs, one for GPUs got none, or no NVIDIA driver answers.
    """
    place = "generation.resources.gpus"
    if platform == "cpu" and gpus:
        raise ConfigError(f"{place}: vLLM in this environment computes on CPUs alone; install upstream's, or set 0")
    if not platform and gpus:
        raise ConfigError(f"{place}: Ray gave {gpus}, but no driver of NVIDIA answers this process (nvidia-smi -L)")
    if not platform or (platform != "cpu" and gpus == 0):  # Ray hides no card from a process that asked for none
        raise ConfigError(f"{place}: vLLM in this environment computes on GPUs, and was given none; ask for 1 or more")


def _given_gpus() -> int | None:
    import ray

    return len(ray.get_gpu_ids()) if ray.is_initialized() else None


def engine_arguments(
    folder: Path,
    engine: EngineConfig,
    *,
    max_length: int | None,
    dtype: str,
    trust_remote_code: bool,
    on_cpu: bool,
    own: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns vLLM's arguments: those of every engine, the caller's ``own``, the recipe's ``extra``, then corrections.

    Args:
        max_length: most tokens. None: the model's limit.
    """
    from spin_ray.runtime.corrections import corrections

    return {
        "model": str(folder),
        "max_model_len": max_length,
        "dtype": dtype,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        "max_num_seqs": engine.max_num_seqs,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "enforce_eager": engine.enforce_eager,
        "trust_remote_code": trust_remote_code,
        "generation_config": "vllm",  # not the model folder's sampling
        "load_format": "safetensors",
        "config_format": "hf",
        **(_whole_prefill(max_length) if on_cpu and max_length else {}),
        **own,
        **engine.extra,
        **corrections(folder, engine.extra, on_cpu=on_cpu, trust_remote_code=trust_remote_code),
    }


def _executor(config: EngineConfig) -> dict[str, Any]:
    if config.pipeline_parallel_size > 1:
        return {"distributed_executor_backend": "ray"}
    return {"distributed_executor_backend": "mp"} if config.tensor_parallel_size > 1 else {}


def lora_arguments(rank: int, *, most: int = 1) -> dict[str, Any]:
    """Returns arguments that let each request name an adapter, at most ``most`` in a batch."""
    return {"enable_lora": True, "max_loras": most, "max_lora_rank": next(size for size in _LORA_RANKS if size >= rank)}


_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks for which vLLM makes room, rising."""


def _whole_prefill(max_length: int) -> dict[str, Any]:
    """Returns arguments that prefill prompts whole (see ``VllmEngine``)."""
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(max_length, 2048)}


def _completion(output: Any) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(
            f"vLLM ended a response with finish_reason {output.finish_reason!r}; expected stop or length"
        )
    return Completion(list(output.token_ids), output.finish_reason, output.cumulative_logprob)
