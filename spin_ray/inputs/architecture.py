"""Refusals of models that cannot be trained, by config.json and the weights' names and shapes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spin_ray.config.sections import LoraConfig
from spin_ray.errors import ConfigError, ModelError, first_line
from spin_ray.inputs.model_folder import read_config
from spin_ray.inputs.vocabulary import vocabulary_of
from spin_ray.learner.rope import rope_limit, switching
from spin_ray.learner.weights import layer_names, tensor_shapes

_HEADS = {"lm_head", "embed_out", "output", "head"}
_EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head"}
_UNAPPLIED = {"kv_b_proj", "shared_expert_gate"}
"""Linear layers whose weights vLLM 0.29 copies or renames before it loads adapters (layers/attention/mla_attention.py,
models/qwen2_moe.py)."""
_LANGUAGE_MODELS = ("forcausallm", "lmheadmodel", "lmheadmodelwithloss")


def refuse_architecture(folder: Path, max_length: int) -> None:
    """Refuses models on which training would fail hours later, or be silently wrong.

    Raises:
        ModelError: transformers has no such causal language model, or the weights are another model's.
        ConfigError: the rotary embedding changes within ``model.max_length``.
    """
    config = read_config(folder)
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{folder}: is an encoder-decoder ({_name(config)}); SPIN needs a causal language model")
    if kind := config.get("model_type"):
        _refuse_unknown(folder, config, kind)
        config = _complete(folder) | {"vocab_size": vocabulary_of(folder)}
    if (limit := rope_limit(config)) and limit < max_length:
        raise ConfigError(f"model.max_length: {max_length} is too long for {folder}: {switching(limit)}")
    for reason in _of_weights(config, tensor_shapes(folder)):
        raise ModelError(f"{folder}: {reason}")


def refuse_unapplied(folder: Path, lora: LoraConfig) -> None:
    """Raises ConfigError for adapters that training applies and vLLM does not."""
    names = set(layer_names(folder))
    if not isinstance(lora.target_modules, str):
        names &= {name.rpartition(".")[2] for name in lora.target_modules}
    found = sorted(names & _UNAPPLIED)
    if found and read_config(folder).get("model_type") != "minicpm3":  # it runs the layer itself
        raise ConfigError(
            f"train.lora: vLLM does not apply adapters of {', '.join(found)}, so with merge: false the opponent would "
            "lack them; name other layers in target_modules, or set merge: true"
        )


def _complete(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder)).to_dict()
    except Exception as error:
        raise ModelError(f"{folder}: transformers does not take its config.json ({first_line(error)})") from error


def _refuse_unknown(folder: Path, config: dict[str, Any], kind: str) -> None:
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as LOADED

    if kind not in LOADED:
        raise ModelError(
            f"{folder}: is a model of type {kind}, and none of the causal language models of transformers "
            f"{__version__}; take one of those, or a newer transformers if it has it"
        )
    loaded = LOADED[kind] if isinstance(LOADED[kind], str) else LOADED[kind][0]
    name = _name(config)
    if name.lower() != loaded.lower() and not name.lower().endswith(_LANGUAGE_MODELS):
        raise ModelError(
            f"{folder}: holds a {name}, and training would make a {loaded} of it, without the rest; save its language "
            f"model alone, as a {loaded}, and take that folder"
        )


def _name(config: dict[str, Any]) -> str:
    named = config.get("architectures") or ["ForCausalLM"]
    return str(named[0])


def _of_weights(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    text = config.get("text_config") or config
    modules = {name: name.removesuffix(".weight").rpartition(".")[2] for name in shapes if name.endswith(".weight")}
    embeds, has_head = (any(module in kinds for module in modules.values()) for kinds in (_EMBEDDINGS, _HEADS))
    if embeds and not has_head and text.get("tie_word_embeddings", config.get("tie_word_embeddings")) is False:
        yield "has no head (lm_head), and its embeddings are not tied: it would be random; save the whole model"
    vocabulary = config.get("vocab_size")
    for name, module in modules.items():
        if module in _EMBEDDINGS and vocabulary and len(shapes[name]) == 2 and shapes[name][0] != vocabulary:
            yield (
                f"{name} has {shapes[name][0]} rows, and config.json a vocab_size of {vocabulary}; save the model "
                "again after resize_token_embeddings"
            )
