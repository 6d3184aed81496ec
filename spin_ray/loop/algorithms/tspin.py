"""T-SPIN (arXiv 2601.08198): a human response, one of θ_t and one of θ_0, without a reference."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import RunDirError
from spin_ray.learner.step import Objective
from spin_ray.loop.algorithms.base import Algorithm, Turn
from spin_ray.loop.stages import pairs
from spin_ray.planning.work import IterationWork, Trees, Work
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.names import sample_of
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import TRIPLET_SCHEMA


class Tspin(Algorithm):
    """Loss ℓ(β [log p(y) − log p(y′)]) + w ℓ(β [log p(y′) − log p(y_0)]), equation 7 (β is α there, w is β).

    Iteration 0 has the first term alone, as in the paper, because y_0 is y′.
    """

    objective_fields = ("beta", "length_normalised", "sft_weight", "keep_identical", "history_weight")

    def problems(self, config: SpinConfig) -> Iterator[str]:
        if config.data.prompts_per_iteration is not None:
            yield "data.prompts_per_iteration: tspin needs θ_0's response to each prompt; leave it out"

    def least_pack(self, config: SpinConfig) -> int:
        of_initial = config.generation.sampling.max_tokens if config.iterations > 1 else 0
        return config.longest_tree + of_initial

    def costs(self, config: SpinConfig, work: Work, iteration: int) -> IterationWork:
        samples = config.generation.samples_per_prompt
        generated = (work.generated,) * samples * (2 if iteration else 1)
        trees = Trees(count=work.rows, prompt=work.prompt, responses=(work.real, *generated), rows=samples)
        return IterationWork(answered=work.rows, trained=trees, scored=())

    def plays(self, run: RunDir) -> Artefact:
        return run.prompts

    def make_pairs(self, turn: Turn) -> None:
        """Commits the pairs, with θ_0's responses from iteration 1 on.

        Raises:
            RunDirError: θ_0 answered other prompts.
        """
        run, iteration = turn.run, turn.iteration
        sources = {"prompts": run.prompts, "generations": run.generations(iteration)}
        if iteration:
            sources["initial_generations"] = run.generations(0)
        played = pairs.joined(run.prompts, run.generations(iteration), iteration)
        tables = _with_initial(played, run.generations(0)) if iteration else played
        inputs = {name: artefact.manifest().digest for name, artefact in sources.items()}
        pairs.make(run, turn.config, iteration, pairs.Fresh(tables, inputs, {"triplets": iteration > 0}))

    def objective(self, config: SpinConfig, iteration: int) -> Objective:
        return Objective(
            loss="reference_free",
            beta=config.at(iteration).beta,
            sft_weight=config.objective.sft_weight,
            length_normalised=config.objective.length_normalised,
            history_weight=config.objective.history_weight if iteration else 0.0,
        )


def _with_initial(played: Iterator[pa.Table], initial: Artefact) -> Iterator[pa.Table]:
    for table, answers in zip(played, initial.tables(), strict=True):
        samples = [sample_of(pair_id) for pair_id in table["pair_id"].to_pylist()]
        if table["prompt_id"] != answers["prompt_id"] or samples != [str(it) for it in answers["sample"].to_pylist()]:
            raise RunDirError(f"{initial.path}: has not the prompts of {table['pair_id'][0]}; choose another --out")
        joined = table.append_column(TRIPLET_SCHEMA.field("initial_ids"), answers["token_ids"])
        yield joined.filter(pc.greater(pc.list_value_length(joined["initial_ids"]), 0))
