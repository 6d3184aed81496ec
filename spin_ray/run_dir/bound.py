"""Settings that a run is bound to, because something in its folder was made with them."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from typing import Any

from spin_ray.config.recipe import is_within
from spin_ray.errors import OtherRunError, was_and_now
from spin_ray.run_dir.names import iteration_name
from spin_ray.run_dir.storage import MANIFEST, Storage

logger = logging.getLogger(__name__)

ROWS = ("prompts", "heldout", "questions")
"""Folders of rendered rows. They are made again in minutes, and only training and answers depend on them."""
_TRAINING = frozenset(("model", "checkpoints", "train_log.jsonl"))
_BEFORE_PAIRS = frozenset(
    ("generations", "engine_audit.parquet", "pairs", "preferences", "wins", "teacher_rows", "revision_prompts",
     "revisions")
)  # fmt: skip
"""Entries of the first iteration that the answers are made into pairs with."""
_BEFORE_MODEL = _BEFORE_PAIRS | {"reference", "teacher", "checkpoints", "train_log.jsonl"}
"""Entries of the first iteration before its model. Checkpoints compare their own settings."""
_OF_ANSWERS = frozenset(("start", "reviser"))
"""Folders with answers that other algorithms read."""
_FREE = frozenset(("quarantine", "tensorboard", "mlruns", "wandb", "probe"))
"""Folders on which nothing depends; a probe compares its own settings."""
_AFTER_PAIRS = ("objective", "train.optimizer")
"""Sections and settings that the training on pairs reads, and nothing before it, but for ``_OF_PAIRS``."""
_AFTER_ANSWERS = (*_AFTER_PAIRS, "train.global_batch_pairs")
_AFTER_WARM_UP = (
    *_AFTER_ANSWERS, "generation", "evaluation", "scorer", "self_filter", "reviser", "sdft", "train.lora",
    "data.prompts_per_iteration",
)  # fmt: skip
"""Those that are first read after the warm-up, but for ``_OF_ROWS``."""
_AFTER_ROWS = (*_AFTER_WARM_UP, "sft", "train")
_OF_ROWS = ("generation.shard_rows", "evaluation.max_rows")
"""Settings of other sections by which rows are made."""
_OF_PAIRS = ("objective.window", "objective.keep_identical")


class Made(IntEnum):
    """How far a run folder has come."""

    NOTHING = 0
    ROWS = 1
    WARM_UP = 2
    """The training of θ_0 has begun."""
    ANSWERS = 3
    """θ_0 has answered."""
    PAIRS = 4
    """There are pairs, by whose batches their scores are made, and θ_1 is not there yet."""
    MORE = 5
    """There is θ_1, or something that spin_ray does not know."""


def made_in(storage: Storage) -> Made:
    """Tells how far the run in ``storage`` has come."""
    return max(_stages(storage), default=Made.NOTHING)


def has_learnt(storage: Storage) -> bool:
    """Tells whether the run in ``storage`` has come further than rows."""
    return any(stage > Made.ROWS for stage in _stages(storage))


def _stages(storage: Storage) -> Iterator[Made]:
    for name in storage.entries():
        if name in _FREE or name.startswith("."):
            continue
        inside = storage.entries(name)
        if name in ROWS:
            yield Made.ROWS if MANIFEST in inside else Made.NOTHING
        elif inside:
            yield _stage_of(storage, name, frozenset(inside))


def _stage_of(storage: Storage, name: str, inside: frozenset[str]) -> Made:
    if name == "sft":
        return Made.WARM_UP if inside <= _TRAINING else Made.ANSWERS
    if name in _OF_ANSWERS:
        return Made.ANSWERS
    if name != iteration_name(0) or not inside <= _BEFORE_MODEL:
        return Made.MORE
    paired = not inside <= _BEFORE_PAIRS or storage.exists(f"{name}/pairs/{MANIFEST}")
    return Made.PAIRS if paired else Made.ANSWERS


def bound_to(made: Made, keys: Iterable[str]) -> list[str]:
    """Returns those of the settings and inputs ``keys`` that something in the folder was made with."""
    if made == Made.NOTHING:
        return []
    free = {
        Made.ROWS: _AFTER_ROWS, Made.WARM_UP: _AFTER_WARM_UP, Made.ANSWERS: _AFTER_ANSWERS, Made.PAIRS: _AFTER_PAIRS,
        Made.MORE: (),
    }[made]  # fmt: skip
    fixed = (*_OF_ROWS, *(_OF_PAIRS if made == Made.PAIRS else ()))
    return [key for key in keys if key in fixed or not is_within(key, free)]


_DIGESTED = {
    "model.path": "model", "model.revision": "model",
    "data.train": "data", "data.heldout": "heldout", "data.questions": "questions",
}  # fmt: skip


def accept(storage: Storage, differing: Mapping[str, tuple[Any, Any]]) -> None:
    """Takes rows back that were made with the old value of a setting or input.

    Raises:
        OtherRunError: something else was made with an old value.
    """
    made = made_in(storage)
    bound = bound_to(made, differing)
    if bound and made > Made.ROWS:
        raise OtherRunError(storage.root, {key: differing[key] for key in bound})
    changed = "; ".join(was_and_now(differing))
    again = "; the rows are made again" if bound else ""
    logger.info("%s: changed before anything was learnt with it: %s%s", storage.root, changed, again)
    if bound or made == Made.NOTHING:
        for name in ROWS:
            storage.delete(f"{name}/{MANIFEST}")  # first: without it, no half of a folder counts
            storage.delete(name)
            storage.delete(f"quarantine/{name}.parquet")


def without_moved(differing: dict[str, tuple[Any, Any]], inputs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Leaves out paths of inputs whose bytes are the same.

    Args:
        differing: old and new value by setting or input.
        inputs: digests in run.json by input.
    """

    def moved(key: str) -> bool:
        digest = _DIGESTED.get(key, "")
        texts = all(isinstance(value, str | None) for value in differing[key])
        return texts and bool(inputs.get(digest)) and digest not in differing

    return {key: values for key, values in differing.items() if not moved(key)}
