"""``spin-ray status`` beside a run that is training: the real loop stands still after a step, and another asks."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spin_ray.config.recipe import SpinConfig
from spin_ray.loop.stages.training import worker
from spin_ray.report.status import is_running, print_status
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support import small_run


def test_status_shows_the_measures_of_a_training_that_goes_on(
    tmp_path: Path, config: SpinConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    step = worker.train_step

    def watched(*arguments: Any) -> dict[str, float]:
        run = RunDir(Storage(tmp_path / "run"))
        if run.storage.exists("iter_000/train_log.jsonl") and is_running(run):
            out = io.StringIO()
            print_status(run, Console(file=out, width=200))
            seen.append(out.getvalue())
        return step(*arguments)

    monkeypatch.setattr(worker, "train_step", watched)
    small_run.run(config, tmp_path / "run")
    assert len(seen) == small_run.STEPS
    assert "iter_000 training, step 3 of 4" in seen[3]
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in seen[3].splitlines() if line.count("│") == 5}
    assert rows["loss"][0].strip() == "0.69315"  # step 0: ln 2
    assert rows["margin"][0].strip() == "0"
    assert {"accuracy", "real_logp", "generated_logp", "real_logp_drift", "grad_norm", "tokens/s"} <= rows.keys()
    assert "Running: iter_000 training for " in seen[3]
