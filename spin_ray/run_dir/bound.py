"""Settings that a run is bound to, because something in its folder was made with them."""

from collections.abc import Iterable, Iterator
from enum import IntEnum

from spin_ray.run_dir.storage import MANIFEST, Storage

ROWS = ("prompts", "heldout", "questions")
"""Folders of rendered rows. They are made again in minutes, and only training and answers depend on them."""
_TRAINING = frozenset(("model", "checkpoints", "train_log.jsonl"))
_FREE = frozenset(("quarantine", "tensorboard", "probe"))
"""Folders on which nothing depends; a probe compares its own settings."""
_SINCE_ANSWERS = (
    "generation", "objective", "evaluation", "scorer", "self_filter", "reviser", "sdft",
    "train.global_batch_pairs", "train.lora", "train.optimizer",
)  # fmt: skip
"""Sections and settings that neither rows nor the warm-up read, but for ``_OF_ROWS``."""
_SINCE_WARM_UP = (*_SINCE_ANSWERS, "sft", "train")
_OF_ROWS = ("generation.shard_rows", "evaluation.max_rows")
"""Settings of other sections by which rows are made."""


class Made(IntEnum):
    """How far a run folder has come."""

    NOTHING = 0
    ROWS = 1
    WARM_UP = 2
    """The training of θ_0 has begun."""
    MORE = 3
    """There are answers, pairs or scores, or something that spin_ray does not know."""


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
            yield Made.WARM_UP if name == "sft" and _TRAINING.issuperset(inside) else Made.MORE


def bound_to(made: Made, keys: Iterable[str]) -> list[str]:
    """Returns those of the settings and inputs ``keys`` that something in the folder was made with."""
    free = {Made.NOTHING: ("",), Made.ROWS: _SINCE_WARM_UP, Made.WARM_UP: _SINCE_ANSWERS, Made.MORE: ()}[made]
    return [key for key in keys if key in _OF_ROWS or not any(_is_within(key, name) for name in free)]


def _is_within(key: str, name: str) -> bool:
    return not name or key == name or key.startswith(f"{name}.")
