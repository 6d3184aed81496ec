"""The rows of a run, what an iteration computes on them, and the optimizer steps and packs that they fill."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from statistics import NormalDist
from typing import ClassVar, Protocol

from spin_ray.config.recipe import SpinConfig
from spin_ray.learner.sizes import LENGTHS_OF_A_PACK

PACKING_LOSS, PART_PACK = 0.03, 0.7
"""Tokens that would fill n packs take (1 + PACKING_LOSS)·n + PART_PACK packs. Fitted to
``learner.packing.plan_epoch``."""
LENGTH_SPREAD = 2 / 3
"""Standard deviation of row lengths over their mean, an assumption."""
QUINTILES = (-1.28, -0.52, 0.0, 0.52, 1.28)
"""Middles of a normal distribution's five equal parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    rows: int
    prompt: float
    """Mean tokens of x with the template."""
    real: float
    """Mean tokens of y."""
    generated: float
    """Mean tokens of y′, assumed as long as y, cut at ``max_tokens``."""
    heldout_rows: int = 0
    rejected: float | None = None
    """Mean tokens of DPO's rejected responses. None: as long as y."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trees:
    """Prompts with their responses."""

    count: int
    prompt: float
    """Mean tokens of a prompt."""
    responses: tuple[float, ...]
    """Mean tokens of each response of a prompt."""
    rows: int = 1
    """Rows of a step's batch in a tree: its pairs, or its responses if there are no pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationWork:
    answered: int
    """Prompts that θ_t answers, each ``generation.samples_per_prompt`` times."""
    trained: Trees
    """Trees of an epoch."""
    scored: tuple[Trees, ...]
    """Trees of each forward pass before training."""


class Planned(Protocol):
    """The part of an algorithm that the plan reads."""

    costs_are_known: ClassVar[bool]

    def least_pack(self, config: SpinConfig) -> int: ...

    def costs(self, config: SpinConfig, work: Work, iteration: int) -> IterationWork: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Packs:
    steps: int
    per_step: float
    per_rank: float
    """Mean packs of a rank in a step."""
    length: float
    """Mean tokens of a pack, with padding."""
    targets: float
    """Mean response tokens of a pack."""
    per_rank_at_most: int
    """Packs of a rank in a step three standard deviations longer than the mean."""
    tokens: float
    """Tokens of the epoch, without padding."""
    visible: float = 0.0
    """Mean pairs of tokens of a pack that see each other."""
    together: float = 0.0
    """Mean pairs of tokens of a pack in one tree, in both orders."""
    slowest: float = 1.0
    """Longest pack of a step over the mean. All ranks wait for it."""


def packs_of(
    trees: float,
    tree_tokens: float,
    targets: float,
    *,
    steps: float,
    pack_length: int,
    workers: int,
    visible: float = 0.0,
) -> Packs:
    """Returns the packs of ``trees`` trees; ``tree_tokens``, ``targets`` and ``visible`` are means.

    A tree, a prompt with its responses, is never cut. So a step has at most as many packs as trees, and ranks without a
    pack wait.
    """
    steps = max(1, ceil(steps))
    per_step = trees / steps
    deviation = LENGTH_SPREAD / per_step**0.5

    def packs(deviations: float) -> int:
        filled = per_step * tree_tokens / pack_length * max(0.0, 1 + deviations * deviation)
        fewest = max(1, round((1 + PACKING_LOSS) * filled + PART_PACK))
        return ceil(fewest / workers) * workers

    counts = [packs(deviations) for deviations in QUINTILES]
    rounds = sum(counts) / len(counts) / workers
    mean = sum(min(count, max(1.0, per_step)) for count in counts) / len(counts)
    padding = pack_length / LENGTHS_OF_A_PACK / 2
    length = min(per_step * tree_tokens / mean + padding, pack_length)
    longest_tree = min(pack_length, tree_tokens * (1 + LENGTH_SPREAD * _expected_largest(per_step)))
    return Packs(
        steps=steps,
        per_step=mean,
        per_rank=rounds,
        length=length,
        targets=per_step * targets / mean,
        per_rank_at_most=packs(3) // workers,
        tokens=trees * tree_tokens,
        visible=per_step * visible / mean,
        together=per_step * tree_tokens**2 / mean,
        slowest=max(1.0, longest_tree / length) if workers > 1 else 1.0,
    )


def visible_pairs(prompt: float, responses: Iterable[float]) -> float:
    """Returns the pairs of tokens of a tree that see each other."""
    return prompt**2 / 2 + sum(prompt * response + response**2 / 2 for response in responses)


def _expected_largest(count: float) -> float:
    """Returns the expected largest of ``count`` normal deviates (Blom's approximation)."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def played_rows(config: SpinConfig, work: Work) -> int:
    return min(config.data.prompts_per_iteration or work.rows, work.rows)


def played_pairs(config: SpinConfig, work: Work, opponents: int) -> Trees:
    """Returns the trees of an epoch against so many opponents. Each holds y once and every y′."""
    played = played_rows(config, work)
    repeats, groups = (opponents, 1) if played == work.rows else (1, opponents)
    branches = config.generation.samples_per_prompt * repeats
    return Trees(
        count=played * groups,
        prompt=work.prompt,
        responses=(work.real, *branches * [work.generated]),
        rows=branches,
    )


def epoch_packs(config: SpinConfig, trees: Trees, readers: int) -> Packs:
    """Returns the packs of an epoch. A step holds whole trees, at least one.

    Args:
        readers: groups of ranks that read their own packs.
    """
    targets = sum(trees.responses)
    return packs_of(
        trees.count,
        trees.prompt + targets,
        targets,
        steps=trees.count / max(1, config.train.global_batch_pairs // trees.rows),
        pack_length=config.train.pack_length,
        workers=readers,
        visible=visible_pairs(trees.prompt, trees.responses),
    )


def sft_packs(config: SpinConfig, batch: int, work: Work, readers: int) -> Packs:
    """Returns the warm-up's packs, of ``batch`` rows a step: x and y alone."""
    return packs_of(
        work.rows, work.prompt + work.real, work.real,
        steps=work.rows / batch, pack_length=config.train.pack_length, workers=readers,
        visible=visible_pairs(work.prompt, [work.real]),
    )  # fmt: skip


def heldout_packs(config: SpinConfig, work: Work, samples: int, readers: int) -> Packs:
    """Returns an evaluation's packs: y and the samples of so many iterates, in one step."""
    responses = work.real + samples * work.generated
    return packs_of(
        work.heldout_rows, work.prompt + responses, responses,
        steps=1, pack_length=config.train.pack_length, workers=readers,
        visible=visible_pairs(work.prompt, [work.real, *samples * [work.generated]]),
    )  # fmt: skip
