"""Checks of SPPO's preference models before sampling."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from spin_ray.errors import ConfigError, DataError, ModelError, first_line
from spin_ray.inputs.conversations import Conversation
from spin_ray.inputs.model_folder import positions_of, read_config, refuse_adapter
from spin_ray.inputs.template_variables import TemplateVariables
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


def refuse_too_long(folder: Path, max_length: int) -> None:
    """Raises ConfigError if ``scorer.max_length`` is more than the positions that the model has learnt.

    Rotary and relative positions have no end; PairRM reads 2048 tokens, though its config.json says 512.
    """
    tables = [shape for name, shape in tensor_shapes(folder).items() if _TABLE.search(name) and "vision" not in name]
    if not tables:
        return
    described = read_config(folder)
    rows = min(shape[0] for shape in tables)
    if any(family in str(described.get("model_type")) for family in _AFTER_THE_PAD):
        pad_id = described.get("pad_token_id")
        limit = rows - 1 - (1 if pad_id is None else pad_id)
    else:
        limit = min(rows, positions_of(described) or rows)  # OPT's table has two rows more
    if max_length > limit:
        raise ConfigError(
            f"scorer.max_length: {max_length} is more than the {limit} positions of {folder}; set {limit} or less"
        )


_TABLE = re.compile(r"(^|\.)(wpe|position_embeddings|embed_positions)\.weight$")
_AFTER_THE_PAD = (
    "roberta", "camembert", "longformer", "mpnet", "xmod", "data2vec-text", "esm", "ibert", "luke", "markuplm", "lilt",
)  # fmt: skip
"""Families whose first position is the one after ``pad_token_id``."""


def refuse_other_roles(folder: Path, rows: Iterable[tuple[str, Conversation]], variables: TemplateVariables) -> None:
    """Renders rows (place, messages) as the preference model reads them.

    Raises:
        DataError: its chat template refuses one.
    """
    tokenizer = open_tokenizer(folder)
    if not tokenizer.chat_template:
        return
    for place, messages in rows:
        try:
            tokenizer.apply_chat_template(messages, tokenize=False, **variables.arguments(tokenizer))
        except Exception as error:  # the template's own, and jinja's
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise DataError(
                f"scorer.path {folder}: its chat template refuses {place}, with the roles {roles} "
                f"({first_line(error)}); take another preference model, or mend the rows"
            ) from error


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
