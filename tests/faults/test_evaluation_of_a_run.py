"""Measures of a whole small run against plain transformers, one response at a time."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from spin_ray.config.recipe import SpinConfig
from spin_ray.loop.algorithms.base import SPIN_FIELDS, Algorithm
from spin_ray.loop.stages import pairs
from spin_ray.report.uncertainty import CONFIDENCE
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support import small_run
from tests.support.learner_cases import logp_alone


def test_the_kl_to_the_base_is_measured_for_every_iterate_on_its_own_samples(
    tmp_path: Path, config: SpinConfig
) -> None:
    """θ_2 against θ_0, which is neither it nor its opponent; θ_1's opponent is θ_0."""
    run = RunDir(Storage(tmp_path / "run"))
    small_run.run(config.model_copy(update={"iterations": 2}), tmp_path / "run")
    base = load(config.model.path)
    prompts = {row["prompt_id"]: row["prompt_ids"] for table in run.heldout.tables() for row in table.to_pylist()}
    for iterate in (1, 2):
        evaluation = json.loads(run.storage.read(run.eval_path(iterate)))
        model = load(str(run.storage.path(run.model(iterate).path)))
        rows = [row for table in run.heldout_samples(iterate).tables() for row in table.to_pylist()]
        ratios = np.array(
            [
                float(logp_alone(model, prompts[row["prompt_id"]], row["token_ids"]))
                - float(logp_alone(base, prompts[row["prompt_id"]], row["token_ids"]))
                for row in rows
            ]
        )
        assert len(ratios) == small_run.HELDOUT_ROWS
        assert evaluation["kl_to_base"] == pytest.approx(ratios.mean(), abs=1e-4)
        half = stats.sem(ratios) * stats.t.ppf(0.975, len(ratios) - 1)
        assert CONFIDENCE * evaluation["standard_errors"]["kl_to_base"] == pytest.approx(half, abs=2e-4)
        assert 0.1 < evaluation["against_opponent"]["margin_concentration"] <= 1
        assert "against_opponent.margin_concentration" in evaluation["standard_errors"]
    assert not math.isclose(evaluation["kl_to_base"], evaluation["against_self"]["generated_logp_drift"], abs_tol=1e-4)


class FromOutside(Algorithm):
    """SPIN with one's own class, and so without its scores by θ_0."""

    objective_fields = SPIN_FIELDS

    def plays(self, run):
        return run.prompts

    def make_pairs(self, turn):
        pairs.run(turn.run, turn.config, turn.iteration)


@pytest.mark.parametrize("algorithm", ["spin", f"{__name__}:FromOutside"])
def test_the_geometric_reference_reads_log_p_of_the_start_model(
    tmp_path: Path, config: SpinConfig, algorithm: str
) -> None:
    """Every response of iteration 1, of which those of iteration 0 are read from its reference."""
    run = RunDir(Storage(tmp_path / "run"))
    objective = config.objective.model_copy(update={"reference_alpha": 0.5})
    changes = {"iterations": 2, "objective": objective, "algorithm": algorithm}
    small_run.run(config.model_copy(update=changes), tmp_path / "run")
    assert "base_scores" in run.model(2).manifest().inputs
    base = load(config.model.path)
    scores = {row["pair_id"]: row for table in run.base_scores(1).tables() for row in table.to_pylist()}
    rows = [row for table in run.pairs(1).tables() for row in table.to_pylist()]
    assert scores.keys() == {row["pair_id"] for row in rows}
    assert 0 < run.base_scores(1).manifest().counts["responses_scored"] < 2 * len(rows)
    for row in rows:
        for name in ("real", "generated"):
            alone = float(logp_alone(base, row["prompt_ids"], row[f"{name}_ids"]))
            assert scores[row["pair_id"]][f"{name}_logp"] == pytest.approx(alone, abs=1e-4)
    assert not list((tmp_path / "run").rglob("base_scores-*"))


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
