"""A number that is not finite stops training before the optimizer steps; a model that runs away stops the run."""

from pathlib import Path

import pytest
import torch

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import HealthError
from spin_ray.learner.losses import LOSSES, MarginLoss, logistic
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support import small_run
from tests.support.small_run import committed


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_names_its_pairs_and_the_last_checkpoint_goes_on(
    tmp_path: Path, config: SpinConfig, calm: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """Step 2 of 4 goes wrong, as by a fault of the hardware; steps 0 and 1 are in a checkpoint and stay."""
    out, calls = tmp_path / "run", []

    def wrong_once(margin: torch.Tensor) -> torch.Tensor:
        calls.append(margin)
        return logistic(margin) * (bad if len(calls) == 3 else 1.0)

    with monkeypatch.context() as patch:
        patch.setitem(LOSSES, "logistic", MarginLoss(wrong_once))
        with pytest.raises(FloatingPointError, match=r"not finite; .*the pairs of this step: ") as raised:
            small_run.run(config, out)
    named = str(raised.value).rpartition(": ")[2].split(", ")
    pairs = [pair for table in RunDir(Storage(out)).pairs(0).tables() for pair in table["pair_id"].to_pylist()]
    assert len(named) == 6 and set(named) < set(pairs)
    assert [line["step"] for line in read_json_lines(Storage(out), "iter_000/train_log.jsonl")] == [0, 1]
    small_run.run(config, out)
    assert committed(out) == committed(calm)


@pytest.mark.parametrize("limit", ["max_loss", "max_margin"])
def test_a_run_that_runs_away_stops_with_the_reason(tmp_path: Path, config: SpinConfig, calm: Path, limit: str) -> None:
    """Limits that a healthy run passes; without them the same command finishes it."""
    strict = config.model_copy(update={"health": config.health.model_copy(update={"steps": 2, limit: 1e-9})})
    with pytest.raises(HealthError, match=f"stopped after step .* more than health.{limit} 1e-09"):
        small_run.run(strict, tmp_path / "run")
    assert not (tmp_path / "run/iter_000/model").exists()
    small_run.run(config, tmp_path / "run")
    assert committed(tmp_path / "run") == committed(calm)
