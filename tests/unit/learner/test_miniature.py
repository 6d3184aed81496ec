"""Models that no way of scoring fits, told at the start from config.json alone; training's own probe says the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from spin_ray.errors import ModelError
from spin_ray.learner import miniature
from spin_ray.learner.miniature import refuse_unscorable, why_not
from tests.support.model_kinds import KINDS, ModelKind

_SPARSE = KINDS["DeepSeek-V3"].settings | {"index_n_heads": 2, "index_head_dim": 16}


def config_of(model_type: str, **settings: Any) -> str:
    return json.dumps(AutoConfig.for_model(model_type, **settings).to_dict())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ModelKind("bert"), "its tokens see what follows them; SPIN needs a causal language model"),
        (
            ModelKind("gemma3_text", KINDS["Gemma 3 (text)"].settings | {"use_bidirectional_attention": True}),
            "its tokens see what follows them",
        ),
        (ModelKind("deepseek_v32", _SPARSE | {"index_topk": 16}), "auto does not work for DeepseekV32ForCausalLM"),
    ],
)
def test_an_architecture_that_cannot_be_scored_is_refused_before_anything_runs(
    kind: ModelKind, reason: str, tmp_path: Path
) -> None:
    """BERT, EmbeddingGemma, attention that takes 16 of 64 tokens."""
    kind.make().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason) as caught:
        refuse_unscorable(tmp_path, "auto", 64)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_family_of_the_table_passes(name: str) -> None:
    assert why_not(json.dumps(KINDS[name].make().config.to_dict()), "auto", 64) is None


def test_a_layout_that_the_recipe_asks_for_and_the_model_has_not_is_refused() -> None:
    described = json.dumps(KINDS["Mamba 2"].make().config.to_dict())
    assert "model.attention: packed does not work" in (why_not(described, "packed", 64) or "")
    assert why_not(described, "auto", 64) is None


_LARGE = {
    "Llama 3 70B": ("llama", {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                              "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
                              "max_position_embeddings": 8192, "pad_token_id": 128001}, 128),
    "Falcon 7B, 71 heads": ("falcon", {}, 64),
    "Gemma 3 1B, 4 heads": ("gemma3_text", {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4,
                                            "num_key_value_heads": 1}, 256),
    "Gemma 3 with images": ("gemma3", {}, 256),
    "Mamba 2 2.7B": ("mamba2", {}, 64),
    "Qwen3-Next 80B": ("qwen3_next", {}, 256),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", _LARGE)
def test_a_large_model_is_tried_by_a_few_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are cut to 4 as wide ones, layers to a few, tokens to 64; a check of every start takes few seconds."""
    kind, settings, head_dim = _LARGE[name]
    made: list[Any] = []
    make = miniature._made
    monkeypatch.setattr(miniature, "_made", lambda config, seed: made.append(make(config, seed)) or made[-1])
    assert why_not(config_of(kind, **settings), "auto", 32) is None
    (model,) = made
    assert model.config.get_text_config().head_dim == head_dim
    assert model.num_parameters() < 25e6


def test_a_folder_that_lacks_a_weight_is_refused_though_its_config_is_whole(tmp_path: Path) -> None:
    """transformers would make up the weights. Tied embeddings are stored once."""
    KINDS["Llama"].make().save_pretrained(tmp_path)
    refuse_unscorable(tmp_path, "auto", 64)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights, first model\.layers\.1\.mlp\.up_proj"):
        refuse_unscorable(tmp_path, "auto", 64)


@pytest.mark.slow
def test_attention_that_is_sparse_beyond_thousands_of_tokens_shows_in_short_sequences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSeek-V3.2 takes 2,048 tokens of those before: all of them, unless prompt and response may be longer."""
    monkeypatch.setattr(miniature, "REACH", 64)
    settings = _SPARSE | {"max_position_embeddings": 4096}
    described = json.dumps(ModelKind("deepseek_v32", settings).make().config.to_dict())
    assert json.loads(described)["index_topk"] == 2048
    assert "DeepseekV32ForCausalLM" in (why_not(described, "auto", 2049) or "")
    assert why_not(described, "auto", 2048) is None


def test_what_cannot_be_made_small_is_left_to_training() -> None:
    for described in ({"model_type": "mamba2", "hidden_size": 30, "head_dim": 7, "num_heads": 3}, {"vocab_size": 7}):
        assert why_not(json.dumps(described), "auto", 64) is None
