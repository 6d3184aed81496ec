"""Continued SFT, the baseline for self-play. The same prompts cost it less: nobody answers, and y alone is read."""

from spin_ray.config.recipe import SpinConfig
from spin_ray.learner.step import Objective
from spin_ray.loop.algorithms.base import SPIN_FIELDS, Algorithm, PlayedPrompts, Turn, pair_table
from spin_ray.loop.stages import pairs
from spin_ray.planning.work import IterationWork, Trees, Work, played_rows


class ContinuedSft(Algorithm):
    """SFT on the prompts that SPIN would play. A SPIN recipe may keep its ``objective``, and is its own baseline."""

    objective_fields = SPIN_FIELDS

    def costs(self, config: SpinConfig, work: Work, iteration: int) -> IterationWork:
        trees = Trees(count=played_rows(config, work), prompt=work.prompt, responses=(work.real,))
        return IterationWork(answered=0, trained=trees, scored=())

    def make_pairs(self, turn: Turn) -> None:
        played = PlayedPrompts(turn)
        tables = (pair_table(table, turn.iteration, None) for table in played.tables())
        fresh = pairs.Fresh(tables, played.inputs, played.settings, paired=False)
        pairs.make(turn.run, turn.config, turn.iteration, fresh)

    def objective(self, config: SpinConfig, iteration: int) -> Objective:
        return Objective(loss=None)
