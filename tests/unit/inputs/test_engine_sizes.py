"""Numbers of GPUs that vLLM refuses for an engine, as vLLM itself says."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError
from spin_ray.inputs.check import find_inputs
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.engine_sizes import EngineSizes, check_engines
from tests.support.fakes import config_of

QWEN_7B = EngineSizes(heads=28, kv_heads=4, columns=18944)
QWEN_SMALL = EngineSizes(heads=14, kv_heads=2, columns=4864)
PHI_4 = EngineSizes(heads=40, kv_heads=10, columns=17920)
QWEN_MIXTURE = EngineSizes(heads=32, kv_heads=4)


def recipe(size: int, section: str = "generation", **sections: Any) -> SpinConfig:
    engine = {"engine": {"tensor_parallel_size": size}, "resources": {"gpus": size}}
    sampling = {"sampling": {"max_tokens": 8}} if section == "generation" else {}
    return config_of(**{section: engine | sampling}, **sections)


@pytest.mark.parametrize(
    ("sizes", "usable"),
    [(QWEN_7B, [1, 2, 4]), (QWEN_SMALL, [1, 2]), (PHI_4, [1, 2, 5, 10, 20, 40]), (QWEN_MIXTURE, [1, 2, 4, 8, 16, 32])],
)
def test_sizes_divide_heads_and_columns_and_share_key_heads_evenly(sizes, usable):
    assert sizes.usable == usable


@pytest.mark.slow
def test_vllm_makes_layers_of_just_these_sizes(monkeypatch):
    """vLLM's own layers and its own check of heads, told that the group has so many GPUs."""
    config = pytest.importorskip("vllm.config")
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    def refuses(sizes: EngineSizes, gpus: int) -> bool:
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: gpus)
        try:
            with config.set_current_vllm_config(config.VllmConfig()):
                linear.QKVParallelLinear(
                    64, head_size=8, total_num_heads=sizes.heads, total_num_kv_heads=sizes.kv_heads
                )
                linear.MergedColumnParallelLinear(64, [sizes.columns, sizes.columns])
        except AssertionError as error:
            if "not initialized" in str(error):  # the group is patched incompletely
                raise
            return True
        return False

    for sizes in (QWEN_7B, QWEN_SMALL, PHI_4, EngineSizes(heads=32, kv_heads=1, columns=64)):
        found = [gpus for gpus in range(1, sizes.heads + 1) if not refuses(sizes, gpus)]
        assert found == sizes.usable
        model = SimpleNamespace(model_arch_config=SimpleNamespace(total_num_attention_heads=sizes.heads))
        wrong = next(gpus for gpus in range(1, 99) if sizes.heads % gpus)
        with pytest.raises(ValueError, match=rf"heads \({sizes.heads}\) must be divisible by tensor parallel size"):
            config.ModelConfig.verify_with_parallel_config(model, SimpleNamespace(tensor_parallel_size=wrong))


@pytest.mark.parametrize(
    ("kind", "settings", "sizes"),
    [
        ("qwen2", {"num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}, QWEN_7B),
        ("qwen3_moe", {"num_attention_heads": 32, "num_key_value_heads": 4}, QWEN_MIXTURE),
        ("gpt2", {"n_head": 12}, EngineSizes(heads=12, kv_heads=12)),
        ("falcon", {"num_attention_heads": 71, "multi_query": True}, EngineSizes(heads=71, kv_heads=1)),
        (
            "gemma3",
            {"text_config": {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 64}},
            EngineSizes(heads=8, kv_heads=4, columns=64),
        ),
        ("mamba2", {}, None),
    ],
)
def test_the_sizes_of_a_config_json_are_found(kind, settings, sizes):
    assert EngineSizes.of(AutoConfig.for_model(kind, **settings).to_dict()) == sizes
    assert EngineSizes.of({"model_type": "mine", "num_attention_heads": 3}) is None


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (recipe(8), QWEN_7B, "generation.*: 8 does not divide the model's 28 attention heads, as vLLM .* 1, 2 or 4"),
        (recipe(4), PHI_4, "neither 4 nor the model's 10 key and value heads divides .* give 1, 2, 5, 10, 20 or 40"),
        (recipe(7), EngineSizes(heads=7, kv_heads=1, columns=64), "7 does not divide the model's 64 columns.*; give 1"),
        (recipe(4, "serving"), QWEN_SMALL, r"serving\.engine\.tensor_parallel_size: 4 does not divide"),
    ],
)
def test_an_engine_that_vllm_refuses_is_one_error_with_the_sizes_that_work(config, sizes, message):
    with pytest.raises(ConfigError, match=message):
        check_engines(config, sizes)


def test_a_start_refuses_the_engine_before_it_reads_the_weights(monkeypatch):
    tiny = Path(resolve("embedded:tiny-llama"))
    heads = json.loads((tiny / "config.json").read_text())["num_attention_heads"]
    data = {"train": "embedded:arithmetic-train"}
    model = {"path": "embedded:tiny-llama", "max_length": 128}
    monkeypatch.setattr("spin_ray.inputs.check.open_model", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ConfigError, match=f"{2 * heads} does not divide the model's {heads} attention heads"):
        find_inputs(recipe(2 * heads, model=model, data=data))
