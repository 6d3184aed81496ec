"""Parameters of a decoder: by hand on a tiny one, and those of published models."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spin_ray.config.sections import LoraConfig
from spin_ray.errors import ConfigError, ModelError
from spin_ray.learner.adapters import add_adapters
from spin_ray.learner.loading import on_meta
from spin_ray.planning.model_shape import KNOWN_SHAPES, MISTRAL_7B, ModelShape
from spin_ray.planning.weights import adapted_widths, refuse_unknown_layers
from tests.support.planning_cases import TINY, ZEPHYR


def test_parameters_of_the_tiny_decoder_by_hand():
    """2·(576 + 16) + 168 = 1352."""
    assert (TINY.layer_matmuls, TINY.layer, TINY.root, TINY.parameters) == (576, 592, 168, 1352)
    assert replace(TINY, tied=True).parameters == 1352 - 80


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        (MISTRAL_7B, 7_241_732_096),
        (replace(MISTRAL_7B, vocab=128_256), 8_030_261_248),  # Llama 3.1 8B
        (
            ModelShape(
                layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, tied=True
            ),
            134_515_008,  # SmolLM2-135M
        ),
    ],
)
def test_parameters_are_those_that_published_models_have(shape, parameters):
    assert shape.parameters == parameters


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 8}, "has no num_hidden_layers"),
        ({"num_local_experts": 8}, "mixture of experts without num_experts_per_tok"),
        ({"n_routed_experts": 8}, "grouped experts"),
        ({"kv_lora_rank": 8}, "latent attention"),
        ({"model_type": "internlm2"}, "of the family internlm2"),
        ({"layer_types": ["full_attention", "mamba"]}, "layers of the kind mamba"),
    ],
)
def test_a_model_that_the_formulas_do_not_describe_is_refused(config, message):
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    sizes = {} if "hidden_size" in config else dict.fromkeys(names, 8)
    with pytest.raises(ModelError, match=message):
        ModelShape.from_config({"model_type": "llama"} | sizes | config, "m/config.json")


def test_the_zephyr_recipe_is_a_known_shape():
    assert KNOWN_SHAPES[ZEPHYR.model.path] == MISTRAL_7B


@pytest.mark.parametrize(
    ("config", "parameters", "active"),
    [
        (  # Mixtral 8x7B: 46.7B and 12.9B (arXiv 2401.04088: 47B and 13B)
            {
                "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
                "model_type": "mixtral",
            },
            46_702_792_704, 12.9e9,
        ),
        (  # Qwen3-30B-A3B: 30.5B and 3.3B (its model card)
            {
                "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
                "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
                "num_experts_per_tok": 8, "moe_intermediate_size": 768, "model_type": "qwen3_moe",
            },
            30_532_110_336, 3.35e9,
        ),
    ],
)  # fmt: skip
def test_a_token_of_a_mixture_is_multiplied_with_the_active_experts_alone(config, parameters, active):
    shape = ModelShape.from_config(config, "m/config.json")
    assert shape.parameters == pytest.approx(parameters, rel=1e-4)
    assert shape.layers * shape.active_matmuls + shape.root == pytest.approx(active, rel=0.01)
    assert shape.read(1) == pytest.approx(active, rel=0.01), "one token reads what it is multiplied with"
    assert shape.read(1000) == pytest.approx(parameters, rel=1e-3), "many tokens read every expert"


_SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_MIXTURE: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
}  # fmt: skip
_NO_DEFAULTS = {
    "cohere_compass_text", "dots1", "gemma4_assistant", "hunyuan_v1_dense", "ministral", "mllama", "musicgen",
    "musicgen_melody", "nemotron",
}  # fmt: skip
"""Families whose default config makes no model."""
_MHA = {"num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("kind", "sizes", "names"),
    [
        ("mistral", {}, ("self_attn.q_proj", "down_proj")),
        ("phi3", {}, ("qkv_proj", "gate_up_proj")),
        ("glm4", {}, ("gate_up_proj", "down_proj", "v_proj")),
        ("gpt_neox", _MHA, ("query_key_value", "dense")),
        ("starcoder2", {}, ("c_fc", "c_proj", "o_proj")),
        ("phi", {}, ("dense", "fc2")),
        ("nanochat", {}, ("fc1", "k_proj")),
        ("nemotron", {}, ("up_proj", "v_proj")),
        ("qwen2_moe", _MIXTURE, ("shared_expert.up_proj", "shared_expert_gate", "k_proj")),
    ],
)
def test_model_and_adapters_have_the_parameters_of_transformers_and_peft(kind, sizes, names):
    """Counted on the model of the same config.json, without memory for its weights."""
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    config = AutoConfig.for_model(kind, **(_SIZES | sizes))
    shape = ModelShape.from_config(config.to_dict(), "m/config.json")
    for targets in ("all-linear", names):
        lora, model = LoraConfig(rank=3, target_modules=targets), on_meta(config)
        refuse_unknown_layers(lora, shape)
        add_adapters(model, lora, seed=0)
        trained = sum(it.numel() for it in model.parameters() if it.requires_grad)
        assert 3 * adapted_widths(lora, shape) * shape.layers == trained
        # Biases and some norms are not counted; on so narrow a model they are a few in a hundred.
        assert shape.parameters == pytest.approx(sum(it.numel() for it in model.parameters()) - trained, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "trait", "message"),
    [
        ("granitemoeshared", {"shared_intermediate_size": 64}, "shared_intermediate_size"),
        ("cohere2_moe", {"num_shared_experts": 1}, "num_shared_experts"),
        ("cohere2_moe", {"first_k_dense_replace": 1}, "dense and sparse layers"),
    ],
)
def test_what_a_familys_default_lacks_is_refused_where_a_config_has_it(kind, trait, message):
    sizes = _SIZES | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    ModelShape.from_config(AutoConfig.for_model(kind, **sizes).to_dict(), "m")
    with pytest.raises(ModelError, match=message):
        ModelShape.from_config(AutoConfig.for_model(kind, **sizes, **trait).to_dict(), "m")


@pytest.mark.slow
def test_each_family_of_transformers_has_the_counted_weights_or_is_refused():
    """Counted on a model of the family's default config, without memory for its weights."""
    counted = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - _NO_DEFAULTS:
        config = CONFIG_MAPPING[kind]()
        with suppress(ModelError):
            shape = ModelShape.from_config(config.to_dict(), kind)
            weights = sum(it.numel() for it in on_meta(config).parameters())
            counted[kind] = shape.parameters / weights
    assert not {kind: ratio for kind, ratio in counted.items() if abs(ratio - 1) > 0.005}
    assert {"llama", "mistral", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_oss"} < set(
        counted
    )


def _saved(folder: Path, kind: str, **settings: Any) -> Path:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(_SIZES | settings))).save_pretrained(folder)
    return folder


def _renamed(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "house_llm"} | changes))
    return folder


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen2_moe", _MIXTURE), ("mixtral", {}),
        ("gpt_oss", {"num_local_experts": 4}), ("gpt_neox", _MHA), ("phi", {}), ("nemotron", {}),
    ],
)  # fmt: skip
def test_a_folder_has_the_counted_weights(tmp_path, kind, settings):
    assert ModelShape.from_folder(_saved(tmp_path, kind, **settings)).hidden == 32


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_a_folder_with_weights_may_be_of_any_family_that_has_the_counted_ones(tmp_path, kind):
    shape = ModelShape.from_folder(_saved(tmp_path, kind))
    assert ModelShape.from_folder(_renamed(tmp_path)) == shape


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"intermediate_size": 64}),
        ("llama", {"num_hidden_layers": 3}),
        ("llama", {"vocab_size": 122}),
        ("nemotron", {}),  # no gate
    ],
)
def test_a_folder_whose_weights_are_not_the_counted_ones_is_refused(tmp_path, kind, changes):
    _renamed(_saved(tmp_path, kind), **changes)
    with pytest.raises(ModelError, match=r"has [\d,]+ weights in matrices, .* the family house_llm"):
        ModelShape.from_folder(tmp_path)


def test_a_tied_head_that_is_stored_as_well_is_no_other_family(tmp_path):
    folder = _saved(tmp_path, "llama", tie_word_embeddings=False)
    assert not ModelShape.from_folder(folder).tied
    assert ModelShape.from_folder(_renamed(folder, tie_word_embeddings=True)).tied


def test_a_folder_that_lacks_a_shard_is_described_by_its_config(tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_SIZES)).save_pretrained(
        tmp_path, max_shard_size="20KB"
    )
    whole = ModelShape.from_folder(tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    assert ModelShape.from_folder(tmp_path) == whole


def test_without_weights_or_with_quantised_ones_the_family_must_be_known(tmp_path):
    _renamed(_saved(tmp_path, "llama"))
    values = load_file(tmp_path / "model.safetensors")
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in values.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="of the family house_llm"):
        ModelShape.from_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="of the family house_llm"):
        ModelShape.from_folder(tmp_path)
    assert ModelShape.from_folder(_renamed(tmp_path, model_type="llama")).layers == 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lfm2", "the family lfm2"), ("falcon_h1", "the family falcon_h1"), ("qwen3_next", "the family qwen3_next"),
        ("gemma3n", "the family gemma3n"), ("qwen3_5_moe_text", "the family qwen3_5_moe_text"),
        ("llama4", "the family llama4"), ("mistral3", "the family mistral3"), ("qwen2_5_vl", "the family qwen2_5_vl"),
    ],
)  # fmt: skip
def test_a_family_whose_weights_the_formulas_miss_is_refused(kind, message):
    with pytest.raises(ModelError, match=f"m: .*{message}, whose .*cost plan does not know"):
        ModelShape.from_config(CONFIG_MAPPING[kind]().to_dict(), "m")


_GEMMA_3_4B: dict[str, Any] = {
    "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256,
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
"""The published config.json, which leaves out heads and vocabulary."""


def test_a_model_of_text_and_images_that_is_trained_whole_is_counted_whole():
    """Hugging Face gives Gemma 3 4B 4,300,079,472 parameters."""
    shape = ModelShape.from_config(_GEMMA_3_4B, "m")
    with torch.device("meta"):
        whole = Gemma3ForConditionalGeneration(AutoConfig.for_model(**_GEMMA_3_4B))
    assert shape.parameters == sum(it.numel() for it in whole.parameters()) == 4_300_079_472
    tower = (whole.model.vision_tower, whole.model.multi_modal_projector)
    # Norms within the attention of the text are counted beside the decoder, too.
    assert shape.beside == pytest.approx(sum(it.numel() for part in tower for it in part.parameters()), rel=0.001)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab, shape.tied) == (8, 4, 256, 262_208, True)
    assert shape.read(1) == shape.parameters - shape.beside, "text is not read through the tower"
    assert shape.split(2).beside == shape.beside
    assert shape.why_not_split(2) is None and "does not divide" in str(shape.why_not_split(8))


def test_a_folder_of_text_and_images_has_the_weights_of_its_config(tmp_path):
    text = _SIZES | {"head_dim": 8, "model_type": "gemma3_text"}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert ModelShape.from_folder(tmp_path).parameters == sum(it.numel() for it in model.parameters())


@pytest.mark.slow
def test_embeddings_are_tied_where_the_config_does_not_say_as_in_transformers():
    """Gemma's configs, for one, leave it out, and the default of its class is true."""
    compared = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - _NO_DEFAULTS:
        config = CONFIG_MAPPING[kind]()
        written = {name: value for name, value in config.to_dict().items() if name != "tie_word_embeddings"}
        with suppress(ModelError):
            compared.add((kind, ModelShape.from_config(written, kind).tied, config.tie_word_embeddings))
    assert not [kind for kind, found, expected in compared if found != expected]
    assert {("gemma2", True, True), ("llama", False, False)} < compared


def test_layers_whose_widths_are_not_known_are_named():
    """Of a mixture, PEFT adapts no fused experts."""
    refuse_unknown_layers(LoraConfig(target_modules=("qkv_proj", "c_attn")), MISTRAL_7B)
    with pytest.raises(ConfigError, match=r"the widths of 1\.q_proj, Wx, v_porj; the layers .* are q_proj, "):
        refuse_unknown_layers(LoraConfig(target_modules=("q_proj", "v_porj", "attn.Wx", "1.q_proj")), MISTRAL_7B)
    with pytest.raises(ConfigError, match=r"the widths of up_proj; .* are q_proj, k_proj, v_proj, o_proj$"):
        refuse_unknown_layers(LoraConfig(target_modules=("up_proj",)), replace(MISTRAL_7B, experts=8, active=2))
