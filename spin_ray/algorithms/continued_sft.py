"""More supervised fine-tuning: the baseline that self-play must beat at equal compute."""

from collections.abc import Iterator

import pyarrow as pa

from spin_ray.algorithms.base import Turn, chosen_rows, pair_table
from spin_ray.config import SpinConfig, digest
from spin_ray.learner.loop import Objective
from spin_ray.run_dir import RunDir
from spin_ray.stages import pairs


class ContinuedSft:
    """−log p(y) on the prompts that SPIN would play, with ``train``'s epochs, learning rates, optimizer and batch."""

    def plays(self, run: RunDir) -> None:
        return None

    def make_pairs(self, turn: Turn) -> None:
        prompts = turn.run.prompts
        rows = turn.rows_of(prompts)

        def tables() -> Iterator[pa.Table]:
            for table in chosen_rows(prompts, rows):
                yield pair_table(table, turn.iteration, None)

        inputs = {"prompts": prompts.manifest().digest}
        settings = {"rows": digest(rows.tolist()) if rows is not None else "all"}
        pairs.make(turn.run, turn.config, turn.iteration, pairs.Fresh(tables(), inputs, settings, paired=False))

    def objective(self, config: SpinConfig, iteration: int) -> Objective:
        return Objective(loss=None)
