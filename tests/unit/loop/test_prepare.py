"""What training reads of an iteration, for an algorithm from outside: committed, or told with the algorithm's name."""

import re
from typing import Any

import pyarrow as pa
import pytest

from spin_ray.errors import ConfigError, NotCommittedError
from spin_ray.learner.step import Objective
from spin_ray.loop.algorithms import prepare
from spin_ray.loop.algorithms.base import Algorithm, PlayedPrompts, Turn, margin_objective, pair_table
from spin_ray.loop.algorithms.prepare import prepare_training
from spin_ray.loop.algorithms.table import find_algorithm
from spin_ray.loop.stages import pairs
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import TOKEN_IDS
from spin_ray.run_dir.storage import Storage
from tests.support.fakes import config_of, write_prompts


class Constant(Algorithm):
    """Every y′ is the same; nobody answers."""

    objective_fields = (*Algorithm.objective_fields, "reference_alpha")

    def make_pairs(self, turn):
        played = PlayedPrompts(turn)
        tables = (
            pair_table(table, turn.iteration, pa.chunked_array([pa.array([[5, 2]] * table.num_rows, TOKEN_IDS)]))
            for table in played.tables()
        )
        pairs.make(turn.run, turn.config, turn.iteration, pairs.Fresh(tables, played.inputs, played.settings))


class Nothing(Constant):
    def make_pairs(self, turn):
        pass


class NobodyAnswers(Constant):
    def make_pairs(self, turn):
        pairs.run(turn.run, turn.config, turn.iteration)


class ReadsItsOwn(Constant):
    def make_pairs(self, turn):
        turn.run.artefact("mine/words").manifest()


class PromisesWins(Constant):
    makes_wins = True

    def objective(self, config, iteration):
        return Objective(loss="square", beta=0.1)


class PromisesTeacherRows(Constant):
    backend_methods = ("read",)
    makes_teacher_rows = True

    def objective(self, config, iteration):
        return Objective(loss=None, top_k=8)


class WithoutInitial(Constant):
    def objective(self, config, iteration):
        return Objective(loss="reference_free", history_weight=5.0)


@pytest.fixture
def run(tmp_path):
    run = RunDir(Storage(tmp_path))
    write_prompts(run.prompts, 3, 3)
    return run


def turn_of(run: RunDir, algorithm: str, iteration: int = 0, **objective: Any) -> Turn:
    config = config_of(algorithm=algorithm, iterations=2, objective=objective, train={"global_batch_pairs": 1})
    return Turn(
        run=run, config=config, start=None, iteration=iteration, opponent=None, initial="θ_0", play=None,  # type: ignore[arg-type]
    )  # fmt: skip


def made(run: RunDir, name: str, iteration: int = 0, **objective: Any) -> Objective:
    turn = turn_of(run, f"{__name__}:{name}", iteration, **objective)
    return prepare_training(turn, find_algorithm(turn.config.algorithm))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Nothing", "has not committed iter_000/pairs; call stages.pairs.make"),
        ("NobodyAnswers", "reads iter_000/generations, but nobody answers: let plays return the prompts"),
        ("ReadsItsOwn", "reads mine/words, which is not committed"),
        ("PromisesWins", "has not committed iter_000/wins, which the loss square needs"),
        ("PromisesTeacherRows", "has not committed iter_000/teacher_rows, which top_k needs"),
        ("WithoutInitial", r"commits iter_000/pairs without y_0 \(initial_ids\), which history_weight needs"),
    ],
)
def test_an_artefact_that_an_algorithm_forgot_is_told_with_its_name(run, name, problem):
    """Training would say "is not committed; run the command again", which helps nobody."""
    with pytest.raises(ConfigError, match=f"^algorithm: {re.escape(__name__)}:{name}: its make_pairs {problem}"):
        made(run, name)


def test_what_is_missing_in_the_run_of_an_algorithm_of_the_package_is_told_as_it_was(run):
    with pytest.raises(NotCommittedError, match="iter_000/generations: is not committed; run the command again"):
        prepare_training(turn_of(run, "spin"), find_algorithm("spin"))


def test_the_initial_model_scores_the_pairs_of_any_algorithm_that_reads_alpha(run, monkeypatch):
    scored = []
    monkeypatch.setattr(prepare.base_scores, "run", lambda *args: scored.append(args[2:]))
    for iteration, alpha in ((0, 0.5), (1, 1.0), (1, 0.5)):
        objective = made(run, "Constant", iteration, reference_alpha=alpha)
        assert objective == margin_objective(turn_of(run, "spin").config, iteration)
    assert scored == [(1, "θ_0")]
