"""The work of a run: its rows, and how they fall into optimizer steps and packs (``learner.packing``)."""

from dataclasses import dataclass
from math import ceil

from spin_ray.config.recipe import SpinConfig

PACKING_LOSS, PART_PACK = 0.03, 0.7
"""A step whose tokens would fill n packs takes about (1 + loss)·n + part of them: best fit leaves little room, and the
last pack is part empty. Fitted to ``learner.packing.plan_epoch`` on log-normal lengths; a test repeats this."""
LENGTHS_OF_A_PACK = 16
"""Copy of ``learner.step.LENGTHS_OF_A_PACK``: an import would bring torch. A test compares them."""
LENGTH_SPREAD = 2 / 3
"""Standard deviation of a row's length over its mean. An assumption: text is about log-normal with a sigma of 0.6."""
QUINTILES = (-1.28, -0.52, 0.0, 0.52, 1.28)
"""Middles of five equally likely parts of a normal distribution: steps with few tokens to steps with many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Rows and their mean lengths. Example, the paper's: ``Work(rows=50_000, prompt=130, real=256, generated=256)``."""

    rows: int
    """Usable training rows."""
    prompt: float
    """Mean tokens of x, with the chat template."""
    real: float
    """Mean tokens of y."""
    generated: float
    """Mean tokens of y′. Unknown before the run, so taken to be y's, cut at ``max_tokens``."""
    heldout_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Packs:
    """The packs of one epoch."""

    steps: int
    per_step: float
    """Mean packs of a step over all ranks."""
    per_rank: float
    """Mean packs of a step on one rank; every rank has equally many."""
    length: float
    """Mean tokens of a pack, with padding."""
    targets: float
    """Mean response tokens of a pack: the head runs on them alone."""
    per_rank_at_most: int
    """Packs of one rank in a step with three standard deviations more tokens; memory must hold them, too."""
    tokens: float
    """Tokens of the epoch, without padding."""


def packs_of(
    trees: float, tree_tokens: float, targets: float, *, steps: float, pack_length: int, workers: int
) -> Packs:
    """Returns the packs of ``trees`` trees with a mean of ``tree_tokens`` tokens, ``targets`` of them in responses."""
    steps = max(1, ceil(steps))
    per_step = trees / steps
    deviation = LENGTH_SPREAD / per_step**0.5

    def packs(deviations: float) -> int:
        filled = per_step * tree_tokens / pack_length * max(0.0, 1 + deviations * deviation)
        fewest = max(1, round((1 + PACKING_LOSS) * filled + PART_PACK))
        return ceil(fewest / workers) * workers

    counts = [packs(deviations) for deviations in QUINTILES]
    mean = sum(counts) / len(counts)
    padding = pack_length / LENGTHS_OF_A_PACK / 2
    return Packs(
        steps=steps,
        per_step=mean,
        per_rank=mean / workers,
        length=min(per_step * tree_tokens / mean + padding, pack_length),
        targets=per_step * targets / mean,
        per_rank_at_most=packs(3) // workers,
        tokens=trees * tree_tokens,
    )


def played_rows(config: SpinConfig, work: Work) -> int:
    """Returns the prompts that the opponent answers in one iteration."""
    return min(config.data.prompts_per_iteration or work.rows, work.rows)


def pair_packs(config: SpinConfig, work: Work, iteration: int) -> Packs:
    """Returns the packs of an epoch of SPIN.

    A tree is a prompt with y once and every y′ to it: its samples, of all opponents in the window if every iteration
    plays all prompts.
    """
    window = iteration + 1 - max(config.objective.oldest_iteration(iteration), 0)
    played = played_rows(config, work)
    repeats, groups = (window, 1) if played == work.rows else (1, window)
    branches = config.generation.samples_per_prompt * repeats
    trees = played * groups
    return packs_of(
        trees,
        work.prompt + work.real + branches * work.generated,
        work.real + branches * work.generated,
        steps=trees * branches / config.train.global_batch_pairs,
        pack_length=config.train.pack_length,
        workers=config.train.workers,
    )


def sft_packs(config: SpinConfig, work: Work) -> Packs:
    """Returns the packs of an epoch of the warm-up: x and y alone."""
    batch = config.sft.global_batch_rows if config.sft else work.rows
    return packs_of(
        work.rows, work.prompt + work.real, work.real,
        steps=work.rows / batch, pack_length=config.train.pack_length, workers=config.train.workers,
    )  # fmt: skip


def heldout_packs(config: SpinConfig, work: Work) -> Packs:
    """Returns the packs of an evaluation: y with the samples of two iterates, all rows as one step."""
    responses = work.real + 2 * work.generated
    return packs_of(
        work.heldout_rows, work.prompt + responses, responses,
        steps=1, pack_length=config.train.pack_length, workers=config.train.workers,
    )  # fmt: skip
