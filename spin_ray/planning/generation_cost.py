"""Time and memory of generation."""

from dataclasses import dataclass
from math import ceil

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import EngineConfig
from spin_ray.planning.groups import Group
from spin_ray.planning.hardware import GIB, Hardware
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.stage_cost import RUNTIME, StageCost
from spin_ray.planning.traffic import Collective
from spin_ray.planning.work import Work

GENERATION = "generation"
"""Name of the stage."""
ENGINE_START_S = {"eager": 25.0, "compiled": 90.0}
"""Seconds to start vLLM 0.29 with a 135M model on two CPU cores, seen once."""


def generation_cost(
    config: SpinConfig, shape: ModelShape, device: Hardware, work: Work, jobs: tuple[int, ...]
) -> StageCost:
    """Returns the cost of generation; ``jobs`` are numbers of prompts.

    A decode step reads the weights and all keys and values once. A shard's longest response is decoded alone at the
    end. The stages of a pipeline are assumed to work at once, each at its own part of the responses, and to pass them
    on in no time. A response still passes all stages in turn, so that a lone one is not decoded faster.
    """
    settings, engine = config.generation, config.resolve_dtype(config.generation.engine)
    per_shard = max(1, settings.shard_rows // settings.samples_per_prompt) * settings.samples_per_prompt
    responses = [prompts * settings.samples_per_prompt for prompts in jobs]
    rounds = ceil(sum(ceil(count / per_shard) for count in responses) / settings.replicas)
    size = min(per_shard, max(responses))
    seats = _seats(config, shape, device, work, size)

    context = work.prompt + work.generated / 2
    prefill = shape.trunk_flops(work.prompt, work.prompt**2 / 2) + shape.head_flops(1)
    token = shape.trunk_flops(1, context) + shape.head_flops(1)
    stages = engine.pipeline_parallel_size
    busy = min(stages, seats.together)
    parallel = engine.tensor_parallel_size * busy

    def reading(responses: float, context: float) -> float:
        weights = seats.weights * shape.read(responses) / shape.parameters
        return stages * device.reading(weights + responses * context * seats.kv)

    read_s = reading(seats.together / busy, context)
    compute_s = device.seconds(seats.together * token / parallel, engine.dtype)
    longest = min(settings.sampling.max_tokens, config.model.max_length - work.prompt)
    decoding = "decoding: memory bandwidth" if read_s > compute_s else "decoding: compute"
    steps = rounds * size * work.generated / seats.together
    spent = {
        "engine start": ENGINE_START_S["eager" if engine.enforce_eager else "compiled"],
        "prefill: compute": rounds * size * device.seconds(prefill / parallel, engine.dtype),
        decoding: steps * max(read_s, compute_s),
        "longest responses": rounds * max(0.0, longest - work.generated) * reading(1, 0),
        "sums of tensor groups": _sums_s(config, shape, device, rounds * size * work.prompt / busy, 0)
        + _sums_s(config, shape, device, rounds * size * work.generated / busy, steps),
    }
    return StageCost(
        name=GENERATION,
        tokens=sum(responses) * (work.prompt + work.generated),
        flops=sum(responses) * (prefill + work.generated * token),
        seconds=sum(spent.values()),
        bound=max(spent, key=lambda name: spent[name]),
        memory=seats.memory,
        room=seats.room,
    )


def engine_bytes(config: SpinConfig) -> int:
    """Returns the bytes of a number in the engine."""
    return 4 if config.resolve_dtype(config.generation.engine).dtype == "float32" else 2


def _kv_heads(shape: ModelShape, engine: EngineConfig) -> int:
    """Returns the key and value heads of a device. Where the model has fewer than a tensor group has devices, vLLM
    gives each device a copy of one.
    """
    return max(1, shape.kv_heads // engine.tensor_parallel_size)


def _sums_s(config: SpinConfig, shape: ModelShape, device: Hardware, tokens: float, passes: float) -> float:
    size = config.generation.engine.tensor_parallel_size
    width = shape.hidden * engine_bytes(config)
    sums = Collective(
        name="activations", phase="forward", group=Group(size=size, together=size), turns=2,
        sent=2 * shape.layers * 2 * (size - 1) / size * tokens * width,
        calls=2 * shape.layers * passes if size > 1 else 0,
    )  # fmt: skip
    return sums.seconds(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seats:
    """The number of responses decoded together, and bytes per device."""

    together: int
    weights: float
    kv: float
    """Bytes of one token's keys and values."""
    memory: dict[str, float]
    room: float


def _seats(config: SpinConfig, shape: ModelShape, device: Hardware, work: Work, size: int) -> _Seats:
    """Returns the seats for a shard of ``size`` responses.

    vLLM refuses to start unless one response of ``max_length`` fits the cache.
    """
    engine, on_gpu = config.generation.engine, bool(config.generation.resources.gpus)
    dtype_bytes = engine_bytes(config)
    weights = dtype_bytes * shape.parameters / engine.devices
    kv = shape.kv_bytes(dtype_bytes) / shape.kv_heads * _kv_heads(shape, engine) / engine.pipeline_parallel_size
    room = device.memory * (engine.gpu_memory_utilization if on_gpu else 1)
    cache = room - weights - RUNTIME if on_gpu else engine.cpu_kv_cache_gib * GIB
    response, longest = (work.prompt + work.generated) * kv, config.model.max_length * kv
    together = max(1, min(engine.max_num_seqs, size, int(cache // response)))
    used = max(longest, together * response) if on_gpu else cache
    memory = {"weights": weights, "KV cache": used, "runtime": RUNTIME}
    if not on_gpu and longest > cache:
        memory, room = {"KV cache of the longest response": longest}, cache
    return _Seats(together=together, weights=weights, kv=kv, memory=memory, room=room)
