"""Settings that a run is bound to, because something in its folder was made with them."""

from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any

from spin_ray.run_dir.names import iteration_name
from spin_ray.run_dir.storage import MANIFEST, Storage

ROWS = ("prompts", "heldout", "questions")
"""Folders of rendered rows. They are made again in minutes, and only training and answers depend on them."""
_TRAINING = frozenset(("model", "checkpoints", "train_log.jsonl"))
_OF_FIRST_TRAINING = frozenset(
    ("generations", "engine_audit.parquet", "pairs", "reference", "preferences", "wins", "teacher_rows", "teacher",
     "checkpoints", "train_log.jsonl")
)  # fmt: skip
"""Entries of the first iteration before its model. Pairs, scores and checkpoints compare their own settings."""
_FREE = frozenset(("quarantine", "tensorboard", "probe"))
"""Folders on which nothing depends; a probe compares its own settings."""
_AFTER_ANSWERS = ("objective", "train.global_batch_pairs", "train.optimizer")
"""Sections and settings that are first read by the training on pairs."""
_AFTER_WARM_UP = (
    *_AFTER_ANSWERS, "generation", "evaluation", "scorer", "self_filter", "reviser", "sdft", "train.lora",
)  # fmt: skip
"""Those that are first read after the warm-up, but for ``_OF_ROWS``."""
_AFTER_ROWS = (*_AFTER_WARM_UP, "sft", "train")
_OF_ROWS = ("generation.shard_rows", "evaluation.max_rows")
"""Settings of other sections by which rows are made."""


class Made(IntEnum):
    """How far a run folder has come."""

    NOTHING = 0
    ROWS = 1
    WARM_UP = 2
    """The training of θ_0 has begun."""
    ANSWERS = 3
    """θ_0 has answered, and θ_1 is not there yet."""
    MORE = 4
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
        elif name == "sft" and inside:
            yield Made.WARM_UP if _TRAINING.issuperset(inside) else Made.ANSWERS
        elif inside:
            first = name == iteration_name(0) and _OF_FIRST_TRAINING.issuperset(inside)
            yield Made.ANSWERS if first else Made.MORE


def bound_to(made: Made, keys: Iterable[str]) -> list[str]:
    """Returns those of the settings and inputs ``keys`` that something in the folder was made with."""
    free = {
        Made.NOTHING: ("",), Made.ROWS: _AFTER_ROWS, Made.WARM_UP: _AFTER_WARM_UP, Made.ANSWERS: _AFTER_ANSWERS,
        Made.MORE: (),
    }[made]  # fmt: skip
    return [key for key in keys if key in _OF_ROWS or not any(_is_within(key, name) for name in free)]


def _is_within(key: str, name: str) -> bool:
    return not name or key == name or key.startswith(f"{name}.")


_DIGESTED = {
    "model.path": "model", "model.revision": "model",
    "data.train": "data", "data.heldout": "heldout", "data.questions": "questions",
}  # fmt: skip


def without_moved(differing: dict[str, tuple[Any, Any]], inputs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Leaves out paths of inputs whose bytes are the same.

    Args:
        differing: old and new value by setting or input.
        inputs: digests in run.json by input.
    """

    def moved(key: str) -> bool:
        digest = _DIGESTED.get(key, "")
        return bool(inputs.get(digest)) and digest not in differing and all(isinstance(v, str) for v in differing[key])

    return {key: values for key, values in differing.items() if not moved(key)}
