"""DPO (Rafailov et al. 2023, arXiv 2305.18290) on given preferences."""

from collections.abc import Iterator

import pyarrow.compute as pc

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import name_of
from spin_ray.errors import DataError
from spin_ray.loop.algorithms.base import Algorithm, PlayedPrompts, Turn, pair_table
from spin_ray.loop.stages import pairs
from spin_ray.planning.work import IterationWork, Trees, Work, played_rows
from spin_ray.run_dir.run_dir import RunDir


class Dpo(Algorithm):
    """DPO of ``chosen`` against ``rejected``, with θ_t as reference."""

    def problems(self, config: SpinConfig) -> Iterator[str]:
        if config.generation.samples_per_prompt > 1:
            yield "generation.samples_per_prompt: dpo samples no responses to training prompts; leave it out"

    def least_pack(self, config: SpinConfig) -> int:
        return 2 * config.model.max_length - 1  # a prompt of one token, and two responses

    def costs(self, config: SpinConfig, work: Work, iteration: int) -> IterationWork:
        responses = (work.real, work.rejected or work.real)
        trees = Trees(count=played_rows(config, work), prompt=work.prompt, responses=responses)
        return IterationWork(answered=0, trained=trees, scored=self.reference_passes(config, iteration) * (trees,))

    def check_rows(self, run: RunDir, config: SpinConfig) -> None:
        """Raises DataError if a row has no rejected response."""
        count, first = 0, ""
        for table in run.prompts.tables():
            missing = table.filter(pc.is_null(table["rejected_ids"]))
            first = first or (missing["messages"][0].as_py() if missing.num_rows else "")
            count += missing.num_rows
        if count:
            raise DataError(
                f"{name_of(config.data.train)}: {count} rows have no rejected response, first {first[:200]}; algorithm "
                f"{config.algorithm} needs chosen and rejected in each"
            )

    def make_pairs(self, turn: Turn) -> None:
        played = PlayedPrompts(turn)
        tables = (pair_table(table, turn.iteration, table["rejected_ids"]) for table in played.tables())
        pairs.make(turn.run, turn.config, turn.iteration, pairs.Fresh(tables, played.inputs, played.settings))
