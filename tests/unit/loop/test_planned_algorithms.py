"""What the plan says of an iteration, against the tokens and steps of tiny runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spin_ray.errors import ConfigError
from spin_ray.loop.algorithms.sppo.algorithm import Sppo
from spin_ray.loop.algorithms.table import ALGORITHMS, find_algorithm
from spin_ray.planning.cluster import Cluster
from spin_ray.planning.plan import Given, predict
from spin_ray.planning.work import Work, epoch_packs
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support import small_run
from tests.support.fakes import config_of, rows_of
from tests.support.learner_cases import one_rank

SETTINGS: dict[str, dict[str, Any]] = {
    "spin": {},
    "continued_sft": {},
    "dpo": {},
    "tspin": {"objective": {"beta": 1.0}},
    "sdft": {"data": {"max_quarantine_fraction": 0.5}},
}


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("group")):
        yield


def test_the_plan_knows_these_algorithms() -> None:
    assert {name for name, algorithm in ALGORITHMS.items() if algorithm.costs_are_known} == set(SETTINGS)


class Counted(Sppo):
    def costs(self, config, work, iteration):
        raise NotImplementedError


class CountedInPart(Counted):
    costs_are_known = False

    def costs(self, config, work, iteration):
        raise NotImplementedError


@pytest.mark.parametrize(("name", "known"), [("Counted", True), ("CountedInPart", False)])
def test_an_algorithm_that_overrides_its_costs_knows_them(name: str, known: bool) -> None:
    assert find_algorithm(f"{__name__}:{name}").costs_are_known == known


def test_an_algorithm_from_outside_is_told_how_plan_gets_to_know_its_costs() -> None:
    config = config_of(algorithm=f"{__name__}:CountedInPart")
    with pytest.raises(ConfigError, match=r"plan does not know what .*:CountedInPart costs; override its costs$"):
        predict(config, Cluster(gpu="L4"), Given(), CountedInPart())


@pytest.mark.parametrize(("iteration", "alpha", "passes"), [(0, 0.5, 1), (1, 0.5, 2), (1, 1.0, 1)])
def test_alpha_below_1_scores_by_the_initial_model_too(iteration: int, alpha: float, passes: int) -> None:
    config = config_of(iterations=2, objective={"reference_alpha": alpha})
    assert find_algorithm("spin").reference_passes(config, iteration) == passes


def _repeated_tokens(answers: list[dict[str, Any]]) -> int:
    every = [(row["prompt_id"], tuple(row["token_ids"])) for row in answers]
    return sum(len(ids) for _, ids in every) - sum(len(ids) for _, ids in set(every))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_an_epoch_has_the_planned_tokens_and_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan gets the mean lengths of the committed rows, so that the tokens of an epoch are exact.

    It does not know which samples of a prompt will be equal; these are computed once.
    """
    small_run.in_this_process(monkeypatch)
    content = small_run.make_inputs(tmp_path).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "train.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": f"{n} + 1 = ?", "chosen": f"{n + 1}", "rejected": f"not {n}"}) for n in range(9)
        )
    )
    samples = 1 if name == "dpo" else 2
    given = SETTINGS[name] | {"algorithm": name, "iterations": 2, "generation": {"samples_per_prompt": samples}}
    for key, value in given.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    content["train"] |= {"global_batch_pairs": 6, "epochs": 1, "pack_length": 512}
    content["model"]["max_length"] = 256
    config = small_run.SpinConfig.model_validate(content)
    small_run.run(config, tmp_path / "run")
    run = RunDir(Storage(tmp_path / "run"))

    def mean(rows: list[dict[str, Any]], column: str) -> float:
        return sum(len(row[column]) for row in rows) / len(rows)

    prompts = rows_of(run.prompts)
    spent = [event for event in run.events() if (event["event"], event["kind"]) == ("commit", "training")]
    for iteration, measured in enumerate(spent):
        learnt = [iteration] if name == "sdft" else range(iteration + 1)  # of two opponents, or of θ_0 too
        answers = [row for it in learnt if run.generations(it).is_committed for row in rows_of(run.generations(it))]
        work = Work(
            rows=len(prompts),
            prompt=mean(prompts, "prompt_ids"),
            real=mean(prompts, "real_ids"),
            generated=mean(answers, "token_ids") if answers else 0.0,
            rejected=mean(prompts, "rejected_ids") if name == "dpo" else None,
        )
        packs = epoch_packs(config, find_algorithm(name).costs(config, work, iteration).trained, config.train.workers)
        repeated = _repeated_tokens(answers) if name in ("spin", "tspin") else 0
        assert (measured["tokens"] + repeated, measured["steps"]) == (pytest.approx(packs.tokens), packs.steps)
    assert len(spent) == 2
