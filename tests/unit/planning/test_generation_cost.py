"""Time and memory of generation, by hand on a tiny decoder."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ResourcesConfig
from spin_ray.planning.generation_cost import generation_cost
from spin_ray.planning.hardware import BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY, CPU, GIB, Hardware
from spin_ray.planning.model_shape import MISTRAL_7B, ModelShape
from spin_ray.planning.stage_cost import RUNTIME
from spin_ray.planning.work import Work
from tests.support.fakes import config_of
from tests.support.planning_cases import A100, TINY


def generation_config(**generation: object) -> SpinConfig:
    return config_of(
        model={"path": "m", "max_length": 20},
        generation={
            "sampling": {"max_tokens": 10}, "shard_rows": 8, "resources": {"gpus": 1},
            "engine": {"max_num_seqs": 4, "enforce_eager": True}, **generation,
        },
        train={"precision": "bf16"},
    )  # fmt: skip


SLOW_MEMORY = Hardware(name="x", bf16=1e30, fp32=1e30, memory=2 * RUNTIME, bandwidth=1e3, link=1.0)
SLOW_COMPUTE = replace(SLOW_MEMORY, bf16=1e3, bandwidth=1e30)
WORK = Work(rows=16, prompt=6, real=8, generated=8)


def test_decoding_bound_by_memory_by_hand():
    """16 responses are 2 shards of 8, 4 at a time, of 8 tokens: 32 steps, and 2 · (10 − 8) with one response alone.

    A step reads 2·1352 bytes of weights and 4 · (6 + 4) tokens' keys and values of 2·2·1·4·2 = 32 bytes.
    """
    config = generation_config()
    cost = generation_cost(config, TINY, SLOW_MEMORY, WORK, (16,))
    read = 32 * (2704 + 4 * 10 * 32) + 4 * 2704
    assert cost.seconds == pytest.approx(25 + read / (1e3 * BANDWIDTH_EFFICIENCY))
    assert cost.bound == "decoding: memory bandwidth"
    assert cost.memory == {"weights": 2704, "KV cache": 4 * 14 * 32, "runtime": RUNTIME}
    assert cost.room == pytest.approx(0.9 * 2 * RUNTIME)


def test_decoding_bound_by_compute_by_hand():
    """A prompt: 2·(2·576·6 + 4·8·18) + 160 FLOPs; a token after 10 others: 2·(2·576 + 4·8·10) + 160."""
    cost = generation_cost(generation_config(), TINY, SLOW_COMPUTE, WORK, (16,))
    prompt, token = 2 * (1152 * 6 + 32 * 18) + 160, 2 * (1152 + 320) + 160
    assert cost.flops == 16 * (prompt + 8 * token)
    assert cost.seconds == pytest.approx(25 + cost.flops / (1e3 * COMPUTE_EFFICIENCY))
    assert cost.bound == "decoding: compute"


def in_stages(stages: int, seats: int) -> SpinConfig:
    engine = {"max_num_seqs": seats, "enforce_eager": True, "pipeline_parallel_size": stages}
    return generation_config(engine=engine, resources={"gpus": stages})


def test_the_stages_of_a_pipeline_work_at_once_at_parts_of_the_responses():
    """2 stages, 2 of the 4 responses in each: a step reads each stage's 1352 bytes of weights and 2 · 10 · 16 bytes of
    keys and values, twice in turn. A response alone reads all 2704, and compute is half.
    """
    cost = generation_cost(in_stages(2, seats=4), TINY, SLOW_MEMORY, WORK, (16,))
    read = 32 * 2 * (1352 + 2 * 10 * 16) + 4 * 2704
    assert cost.seconds == pytest.approx(25 + read / (1e3 * BANDWIDTH_EFFICIENCY))
    whole, halved = (generation_cost(in_stages(n, seats=4), TINY, SLOW_COMPUTE, WORK, (16,)) for n in (1, 2))
    assert halved.seconds - 25 == pytest.approx((whole.seconds - 25) / 2)


@pytest.mark.parametrize("device", [SLOW_MEMORY, SLOW_COMPUTE])
def test_a_pipeline_decodes_a_lone_response_no_faster(device):
    whole, staged = (generation_cost(in_stages(n, seats=1), TINY, device, WORK, (16,)).seconds for n in (1, 2))
    assert staged == pytest.approx(whole)


def test_a_lone_response_of_a_mixture_reads_its_own_experts_alone():
    """The longest response adds 2 tokens a shard; 3 of 4 experts of each layer are idle then."""
    shape = replace(TINY, experts=4, active=1)
    costs = [
        generation_cost(generation_config(sampling={"max_tokens": tokens}), shape, SLOW_MEMORY, WORK, (16,)).seconds
        for tokens in (8, 10)
    ]
    assert costs[1] - costs[0] == pytest.approx(4 * 2 * shape.read(1) / (1e3 * BANDWIDTH_EFFICIENCY))
    assert shape.read(1) < shape.parameters / 2


def test_replicas_share_whole_shards():
    """Three shards on two engines take as long as four."""
    seconds = [
        generation_cost(generation_config(replicas=2), TINY, SLOW_MEMORY, WORK, (rows,)).seconds for rows in (24, 32)
    ]
    assert seconds[0] == seconds[1]


def test_a_full_cache_holds_fewer_responses_and_takes_longer():
    """Room for 2 responses of 14 tokens instead of 4: twice the steps."""
    small = replace(SLOW_MEMORY, memory=(RUNTIME + 2704 + 2 * 14 * 32 + 1) / 0.9)
    wide, narrow = (generation_cost(generation_config(), TINY, device, WORK, (16,)) for device in (SLOW_MEMORY, small))
    assert narrow.fits and narrow.seconds > wide.seconds


def test_an_engine_must_have_room_for_one_response_of_full_length():
    """20 tokens · 32 bytes beside weights and runtime."""
    enough = (RUNTIME + 2704 + 20 * 32) / 0.9
    for memory, fits in [(enough + 1, True), (enough - 1, False)]:
        assert generation_cost(generation_config(), TINY, replace(SLOW_MEMORY, memory=memory), WORK, (16,)).fits is fits


def test_a_cpu_cache_too_small_for_one_response_does_not_fit():
    """Mistral's keys and values take 131,072 bytes a token: 1 GiB holds 8192."""
    for length, fits in [(8192, True), (8193, False)]:
        config = config_of(
            model={"path": "m", "max_length": length},
            generation={"engine": {"cpu_kv_cache_gib": 1}},
            train={"pack_length": 16384, "precision": "bf16"},
        )
        device = replace(CPU, memory=100 * GIB).share(ResourcesConfig(cpus=2))
        assert generation_cost(config, MISTRAL_7B, device, WORK, (16,)).fits is fits


def test_tensor_parallel_engines_hold_a_part_each():
    half = generation_config(engine={"tensor_parallel_size": 2}, resources={"gpus": 2})
    whole, part = (generation_cost(c, MISTRAL_7B, A100, WORK, (16,)).memory for c in (generation_config(), half))
    assert part["weights"] == whole["weights"] / 2


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (4, 4)])
def test_the_cache_of_a_device_holds_the_heads_that_vllm_gives_it(tensor: int, pipeline: int, tmp_path: Path):
    """Qwen3-30B-A3B has 4 key heads: from 4 devices on each holds one."""
    from vllm.config import ModelConfig, ParallelConfig

    config = Qwen3MoeConfig(num_hidden_layers=48, num_key_value_heads=4, head_dim=128, mlp_only_layers=[])
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path)
    theirs = ModelConfig(str(tmp_path), skip_tokenizer_init=True)
    parallel = ParallelConfig(
        tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, distributed_executor_backend="external_launcher"
    )
    heads, layers = theirs.get_num_kv_heads(parallel), theirs.get_num_layers(parallel)
    engine = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline, "max_num_seqs": 1}
    whole = generation_config(engine=engine, resources={"gpus": tensor * pipeline})
    cost = generation_cost(whole, ModelShape.from_config(config.to_dict(), "config.json"), A100, WORK, (16,))
    assert cost.memory["KV cache"] == 20 * 2 * layers * heads * 128 * 2, "20 tokens, keys and values of 2 bytes"
