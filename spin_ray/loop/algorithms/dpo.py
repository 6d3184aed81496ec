"""DPO (Rafailov et al. 2023, arXiv 2305.18290) on given preferences."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import name_of
from spin_ray.errors import DataError
from spin_ray.loop.algorithms.base import Algorithm, PlayedPrompts, Turn, pair_table
from spin_ray.loop.stages import pairs
from spin_ray.planning.work import IterationWork, Trees, Work, played_rows


class Dpo(Algorithm):
    """DPO of ``chosen`` against ``rejected``, with θ_t as reference."""

    costs_are_known = True

    def problems(self, config: SpinConfig) -> Iterator[str]:
        if config.generation.samples_per_prompt > 1:
            yield "generation.samples_per_prompt: dpo samples no responses to training prompts; leave it out"
        if config.train.pack_length < self.least_pack(config):
            yield (
                f"train.pack_length: {config.train.pack_length} may not hold a prompt with both responses of its row; "
                f"raise it to {self.least_pack(config)} (2 × model.max_length - 1) or lower model.max_length"
            )

    def least_pack(self, config: SpinConfig) -> int:
        return 2 * config.model.max_length - 1  # a prompt of one token, and two responses

    def costs(self, config: SpinConfig, work: Work, iteration: int) -> IterationWork:
        responses = (work.real, work.rejected or work.real)
        trees = Trees(count=played_rows(config, work), prompt=work.prompt, responses=responses)
        return IterationWork(answered=0, trained=trees, scored=self.reference_passes(config, iteration) * (trees,))

    def make_pairs(self, turn: Turn) -> None:
        """Commits the pairs.

        Raises:
            DataError: a row has no rejected response.
        """
        played = PlayedPrompts(turn)

        def tables() -> Iterator[pa.Table]:
            for table in played.tables():
                missing = table.filter(pc.is_null(table["rejected_ids"]))
                if missing.num_rows:
                    raise DataError(
                        f"{name_of(turn.config.data.train)}: {missing.num_rows} rows have no rejected response, first "
                        f"{missing['messages'][0].as_py()[:200]}; algorithm dpo needs chosen and rejected in each"
                    )
                yield pair_table(table, turn.iteration, table["rejected_ids"])

        pairs.make(turn.run, turn.config, turn.iteration, pairs.Fresh(tables(), played.inputs, played.settings))
