"""How each algorithm makes the rows of an iteration, and which objective they feed; without Ray, engine or training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import END_OF_TURN, config_of, write_answers, write_prompts, write_rows

from spin_ray.algorithms import ALGORITHMS, Turn
from spin_ray.config import AlgorithmName, SpinConfig
from spin_ray.errors import DataError
from spin_ray.learner.loop import Objective
from spin_ray.model_folder import ModelFolder
from spin_ray.run_dir import Artefact, RunDir
from spin_ray.storage import Storage
from spin_ray.types import PROMPT_SCHEMA

THETA = ModelFolder(Path("m"), "digest of θ_t", "iter_000", 0)


@pytest.fixture
def run(tmp_path):
    return RunDir(Storage(tmp_path))


def config_for(algorithm: AlgorithmName, **sections: Any) -> SpinConfig:
    return config_of(algorithm=algorithm, **({"train": {"global_batch_pairs": 1}} | sections))


def turn_of(run: RunDir, config: SpinConfig, iteration: int = 0, **changes: Any) -> Turn:
    def play(model: ModelFolder, jobs: list[Any]) -> None:
        pytest.fail(f"{model.name} was asked to answer {jobs}")

    turn = Turn(
        run=run, config=config, start=None, iteration=iteration, player=THETA, first=THETA, play=play,  # type: ignore[arg-type]
    )  # fmt: skip
    return replace(turn, **changes)


def rows_of(artefact: Artefact) -> list[dict[str, Any]]:
    return [row for table in artefact.tables() for row in table.to_pylist()]


def make_pairs(run: RunDir, config: SpinConfig, iteration: int = 0, **changes: Any) -> list[dict[str, Any]]:
    ALGORITHMS[config.algorithm].make_pairs(turn_of(run, config, iteration, **changes))
    return rows_of(run.pairs(iteration))


# SPIN


def test_spin_learns_from_its_own_answers_with_the_values_of_the_iteration(run):
    config = config_for("spin", iterations=2, objective={"beta": [0.1, 5.0], "loss": "hinge", "sft_weight": 0.5})
    write_prompts(run.prompts, 2, 2)
    write_answers(run.generations(0), [("p000", 0, [50, END_OF_TURN])], 2)
    assert [row["pair_id"] for row in make_pairs(run, config)] == ["p000/000/0"]
    spin = ALGORITHMS["spin"]
    assert spin.plays(run) == run.prompts
    assert spin.objective(config, 1) == Objective(loss="hinge", beta=5.0, sft_weight=0.5)


# Baselines


def test_continued_sft_takes_the_prompts_that_spin_would_play_and_no_engine(run):
    config = config_for("continued_sft", data={"train": "d", "prompts_per_iteration": 3})
    write_prompts(run.prompts, 9, part_rows=4)
    sft = ALGORITHMS["continued_sft"]
    assert sft.plays(run) is None
    rows = [make_pairs(run, config, iteration) for iteration in range(3)]
    played = [[row["prompt_id"] for row in each] for each in rows]
    assert sorted(prompt for each in played for prompt in each) == [f"p{i:03d}" for i in range(9)]
    number = int(played[0][0][1:])
    assert rows[0][0] == {
        "pair_id": f"p{number:03d}/000/0", "prompt_id": f"p{number:03d}", "iteration": 0, "prompt_ids": [1, number],
        "real_ids": [10 + number, END_OF_TURN], "generated_ids": [],
    }  # fmt: skip
    assert sft.objective(config, 0) == Objective(loss=None)


def write_preferences(run: RunDir, rejected: list[list[int] | None]) -> None:
    rows = [
        {"prompt_id": f"p{i}", "prompt_ids": [1, i], "real_ids": [7, 2], "messages": "[]", "rejected_ids": ids}
        for i, ids in enumerate(rejected)
    ]
    write_rows(run.prompts, PROMPT_SCHEMA, rows, part_rows=2)


def test_dpo_sets_chosen_against_rejected_without_an_engine(run):
    write_preferences(run, [[8, 2], [9, 2], [7, 2]])
    assert ALGORITHMS["dpo"].plays(run) is None
    rows = make_pairs(run, config_for("dpo", objective={"beta": 0.1}))
    assert [(row["real_ids"], row["generated_ids"]) for row in rows] == [([7, 2], [8, 2]), ([7, 2], [9, 2])]
    assert run.pairs(0).manifest().counts["dropped_identical"] == 1


def test_dpo_refuses_rows_without_a_rejected_response(run):
    write_preferences(run, [[8, 2], None])
    with pytest.raises(DataError, match="1 rows have no rejected response"):
        make_pairs(run, config_for("dpo"))


def test_rows_that_are_there_are_not_made_again(run):
    write_preferences(run, [[8, 2]])
    for _ in range(2):
        make_pairs(run, config_for("dpo"))
    assert [event["event"] for event in run.events()] == ["start", "commit"]
