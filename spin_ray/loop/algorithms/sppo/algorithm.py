"""SPPO (Wu et al. 2024, arXiv 2405.00675): self-play on preferences."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa

from spin_ray.config.recipe import SpinConfig
from spin_ray.learner.step import Objective
from spin_ray.loop.algorithms.base import Algorithm, Turn
from spin_ray.loop.stages import pairs
from spin_ray.run_dir.artefact import Artefact, digests
from spin_ray.run_dir.names import part_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA, WIN_SCHEMA


class Sppo(Algorithm):
    """The best of K samples of θ_t against the worst, by a preference model or grader.

    The square loss moves each log-ratio towards (P − ½)/β.
    """

    needs = ("scorer",)
    makes_wins = True
    objective_fields = ("beta",)

    def problems(self, config: SpinConfig) -> Iterator[str]:
        if config.generation.samples_per_prompt < 2:
            yield "generation.samples_per_prompt: sppo compares samples of a prompt; give 2 or more (paper: 5)"

    def plays(self, run: RunDir) -> Artefact:
        return run.prompts

    def make_pairs(self, turn: Turn) -> None:
        from spin_ray.loop.algorithms.sppo import grades, preferences

        run, config = turn.run, turn.config
        if turn.start.scorer is None:
            grades.run(run, config, turn.iteration, turn.opponent)
        else:
            preferences.run(run, config, turn.iteration, turn.start.scorer, turn.opponent)
        inputs = digests(run.prompts, run.generations(turn.iteration), run.preferences(turn.iteration))
        tables = (table for table, _ in _duels(turn))
        pairs.make(run, config, turn.iteration, pairs.Fresh(tables, inputs, {"pair": "best against worst"}))
        _commit_wins(turn)

    def objective(self, config: SpinConfig, iteration: int) -> Objective:
        return Objective(loss="square", beta=config.at(iteration).beta)


def _commit_wins(turn: Turn) -> None:
    made, target = turn.run.pairs(turn.iteration), turn.run.wins(turn.iteration)
    inputs = {"pairs": made.manifest().digest}
    if target.already_made(inputs, {}):
        return
    kept = {name for table in made.tables() for name in table["pair_id"].to_pylist()}
    rows = [row for _, wins in _duels(turn) for row in wins if row["pair_id"] in kept]
    entry = target.replace_part(part_name(0), pa.Table.from_pylist(rows, WIN_SCHEMA))
    target.commit({part_name(0): entry}, inputs, {})


def _duels(turn: Turn) -> Iterator[tuple[pa.Table, list[dict[str, Any]]]]:
    run, iteration = turn.run, turn.iteration
    compared = run.preferences(iteration).tables()
    for played, wins in zip(pairs.joined(run.prompts, run.generations(iteration), iteration), compared, strict=True):
        rows, of_rows = [], []
        samples = zip(played.to_pylist(), wins["win"].to_pylist(), strict=True)
        for _, group in groupby(samples, key=lambda sample: sample[0]["prompt_id"]):
            answers = list(group)
            (best, best_win), (worst, worst_win) = (choose(answers, key=lambda each: each[1]) for choose in (max, min))
            rows.append(best | {"real_ids": best["generated_ids"], "generated_ids": worst["generated_ids"]})
            of_rows.append({"pair_id": best["pair_id"], "real_win": best_win, "generated_win": worst_win})
        yield pa.Table.from_pylist(rows, PAIR_SCHEMA), of_rows
