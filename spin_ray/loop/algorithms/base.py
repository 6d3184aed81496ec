"""The interface of an algorithm."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.errors import DataError
from spin_ray.inputs.check import Start
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.learner.step import Objective
from spin_ray.loop.stages.generation.shards import Job, prompt_slice
from spin_ray.planning.work import IterationWork, Work, played_pairs, played_rows
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.names import pair_id
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import pairs_of


@dataclass(frozen=True, kw_only=True)
class Turn:
    run: RunDir
    config: SpinConfig
    start: Start
    iteration: int
    opponent: ModelFolder
    """θ_t, the model that training starts from."""
    initial: ModelFolder
    """θ_0."""
    play: Callable[[ModelFolder, list[Job]], None]
    """Function that lets a model answer the jobs that are not committed."""

    def rows_of(self, prompts: Artefact) -> np.ndarray | None:
        """Returns the row numbers of this iteration, or None for all rows."""
        wanted = self.config.data.prompts_per_iteration
        return prompt_slice(prompts.manifest().rows, wanted, self.iteration, self.config.seed)


MARGIN_FIELDS = ("loss", "beta", "length_normalised", "sft_weight", "positive_weight", "mu", "keep_identical")
"""Fields of ``objective`` that ``margin_objective``, the pairs' stage and the evaluation read."""
CHECKED_ROWS = 64
"""Rows that ``check_rows`` renders."""
SPIN_FIELDS = (*MARGIN_FIELDS, "window", "reference_alpha")


class Algorithm(ABC):
    """Base class of the algorithms. All state is in the run folder."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Sections and fields that the recipe must give, e.g. ``scorer``."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Sections and fields that the recipe may give."""
    makes_wins: ClassVar[bool] = False
    """True if ``make_pairs`` commits win probabilities (``iter_NNN/wins``)."""
    makes_teacher_rows: ClassVar[bool] = False
    """True if ``make_pairs`` commits rows for a teacher (``iter_NNN/teacher_rows``), which ``top_k`` needs."""
    objective_fields: ClassVar[tuple[str, ...]] = MARGIN_FIELDS
    """Fields of ``objective`` that the recipe may give. The evaluation of any algorithm reads ``beta``."""
    backend_methods: ClassVar[tuple[str, ...]] = ()
    """Methods of a backend that other algorithms do without."""
    costs_are_known: ClassVar[bool] = False
    """True if ``costs`` counts all that the algorithm computes, so that ``spin-ray plan`` can tell its hours.

    True for a class that overrides ``costs``, unless it says otherwise.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "costs" in vars(cls) and "costs_are_known" not in vars(cls):
            cls.costs_are_known = True

    def problems(self, config: SpinConfig) -> Iterator[str]:
        """Yields a sentence for each unusable setting."""
        yield from ()

    def least_pack(self, config: SpinConfig) -> int:
        """Returns the least ``train.pack_length``: the tokens of the longest prompt with its responses."""
        return config.longest_tree

    def costs(self, config: SpinConfig, work: Work, iteration: int) -> IterationWork:
        """Returns what an iteration computes. Default: answers all prompts, and scores and learns SPIN's pairs."""
        trees = played_pairs(config, work, self.opponents(config, iteration))
        passes = self.reference_passes(config, iteration)
        return IterationWork(answered=played_rows(config, work), trained=trees, scored=passes * (trees,))

    def opponents(self, config: SpinConfig, iteration: int) -> int:
        """Returns the number of iterates whose responses an iteration learns from. Default: one, θ_t."""
        return 1

    def reference_passes(self, config: SpinConfig, iteration: int) -> int:
        """Returns the number of times that an iteration's rows are scored before training: by θ_t, by θ_0, or not."""
        loss = self.objective(config, iteration).resolve()
        by_initial = loss.needs_reference and config.mixes_references(iteration)
        return int(loss.needs_reference or loss.needs_wins) + by_initial

    def check_rows(self, run: RunDir, config: SpinConfig) -> None:  # noqa: B027
        """Raises DataError if the committed prompts or questions lack what the algorithm needs of them."""

    def plays(self, run: RunDir) -> Artefact | None:
        """Returns the prompts that θ_t answers, if any."""
        return None

    @abstractmethod
    def make_pairs(self, turn: Turn) -> None:
        """Commits ``iter_NNN/pairs`` and the algorithm's other artefacts. θ_0's scores for α-SPIN are made after it."""

    def objective(self, config: SpinConfig, iteration: int) -> Objective:
        """Returns the objective for training on the pairs: the recipe's loss of a margin, if not overridden."""
        return margin_objective(config, iteration)


def shortest_rows(prompts: Artefact) -> pa.Table:
    """Returns ``CHECKED_ROWS`` rows at most: the shortest of the first and of the last part, as files may be sorted."""
    parts = sorted(prompts.manifest().files.items())
    found = []
    for name, entry in dict([parts[0], parts[-1]]).items():
        table = prompts.read_part(name, entry)
        lengths = pc.add(pc.list_value_length(table["prompt_ids"]), pc.list_value_length(table["real_ids"]))
        found.append(table.take(pc.sort_indices(lengths)[: CHECKED_ROWS // 2]))
    return pa.concat_tables(found)


def refuse_no_room(prompts: Sequence[int], config: SpinConfig, made: str, room: int = 1) -> None:
    """Raises DataError if no prompt that ``made`` makes of ``shortest_rows`` leaves room for its response.

    Args:
        prompts: tokens of each.
        room: least tokens of a response.
    """
    longest = config.model.max_length
    if prompts and min(prompts) + room > longest:
        raise DataError(
            f"{made}: the prompts that it makes of {len(prompts)} short rows have {min(prompts)} tokens and more, and "
            f"a response needs {room}, so that none fits model.max_length, {longest}; raise that"
        )


def margin_objective(config: SpinConfig, iteration: int) -> Objective:
    return Objective(
        loss=config.objective.loss,
        beta=config.at(iteration).beta,
        sft_weight=config.objective.sft_weight,
        length_normalised=config.objective.length_normalised,
        mu=config.objective.mu,
        positive_weight=config.objective.positive_weight,
    )


@dataclass(frozen=True)
class PlayedPrompts:
    """The prompts of an iteration without generation."""

    turn: Turn

    @property
    def inputs(self) -> dict[str, str]:
        return {"prompts": self.turn.run.prompts.manifest().digest}

    @property
    def settings(self) -> dict[str, str]:
        rows = self.turn.rows_of(self.turn.run.prompts)
        return {"rows": digest(rows.tolist()) if rows is not None else "all"}

    def tables(self) -> Iterator[pa.Table]:
        prompts, start = self.turn.run.prompts, 0
        rows = self.turn.rows_of(prompts)
        for table in prompts.tables():
            if rows is None:
                yield table
            else:
                mine = rows[(rows >= start) & (rows < start + table.num_rows)] - start
                yield table.take(pa.array(mine, pa.int64()))
            start += table.num_rows


def pair_table(prompts: pa.Table, iteration: int, generated: pa.ChunkedArray | None, sample: int = 0) -> pa.Table:
    """Returns PAIR_SCHEMA rows with ``generated`` as y′; None makes SFT rows, without y′.

    Args:
        sample: number of the pair among those of its prompt and iteration, as a ``pair_id`` is unique.
    """
    ids = [pair_id(prompt_id, iteration, sample) for prompt_id in prompts["prompt_id"].to_pylist()]
    return pairs_of(ids, iteration, prompts["prompt_id"], prompts["prompt_ids"], prompts["real_ids"], generated)
