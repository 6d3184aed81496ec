"""Checks of SPPO's preference models before sampling."""

from pathlib import Path
from typing import Literal

from spin_ray.errors import ModelError, first_line
from spin_ray.inputs.model_folder import read_config, refuse_adapter
from spin_ray.learner.tokenizer_file import open_tokenizer
from spin_ray.learner.weights import find_packed, refuse_damaged, tensor_shapes

_OF_PAIRRM = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "n_tasks")
_HEAD_OF_PAIRRM = ("head_layer.1.weight", "head_layer.4.weight")


def refuse_no_scorer(folder: Path, kind: Literal["reward", "pairrm"]) -> None:
    """Raises ModelError if the folder holds no usable preference model."""
    refuse_damaged(folder)
    refuse_adapter(folder)
    reason = _why_no_reward(folder) if kind == "reward" else _why_no_pairrm(folder)
    if reason := reason or _why_no_tokenizer(folder):
        raise ModelError(f"scorer.path {folder}: is no {kind} model ({reason})")


def _why_no_reward(folder: Path) -> str | None:
    from transformers import AutoConfig, AutoModelForSequenceClassification  # slow
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as LOADED

    described = read_config(folder)
    family, name = described.get("model_type"), (described.get("architectures") or [""])[0].removeprefix("FSDP")
    if family not in LOADED:
        return f"transformers has no classifier of sequences for a model of type {family}"
    if name and name != LOADED[family]:
        return f"it holds a {name}, whose reward would be random; take a {LOADED[family]}"
    try:
        outputs = AutoConfig.from_pretrained(folder).num_labels
    except Exception as error:
        return f"transformers does not take its config.json: {first_line(error)}"
    if outputs != 1:
        return f"it has {outputs} outputs, a reward model has one"
    from spin_ray.learner.loading import missing_weights

    missing = missing_weights(folder, AutoModelForSequenceClassification)
    if described.get("quantization_config"):  # their matrices have other names (qweight, scales)
        modules = {stored.rpartition(".")[0] for stored in tensor_shapes(folder)}
        missing = [name for name in missing if name.rpartition(".")[0] not in modules]
    elif packed := find_packed(folder):
        return f"{packed}, and config.json has no quantization_config"
    return f"it lacks {len(missing)} weights, first {missing[0]}" if missing else None


def _why_no_pairrm(folder: Path) -> str | None:
    described, stored = read_config(folder), tensor_shapes(folder).keys()
    if packed := find_packed(folder):
        return f"{packed}, which is not dequantised"
    lacking = [name for name in _OF_PAIRRM if name not in described]
    if lacking:
        return f"config.json has no {lacking[0]}"
    missing = [name for name in _HEAD_OF_PAIRRM if name not in stored]
    return f"it lacks the weights {missing[0]}" if missing else None


def _why_no_tokenizer(folder: Path) -> str | None:
    try:
        open_tokenizer(folder)
    except Exception as error:
        return f"its tokenizer does not load: {first_line(error)}"
    return None
