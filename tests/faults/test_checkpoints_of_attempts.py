"""What an ended attempt at a training leaves behind is used, or said, or removed."""

from pathlib import Path
from typing import Any

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.loop.stages.training import stage as training
from tests.support import small_run
from tests.support.small_run import committed


@pytest.mark.parametrize("keeps", [False, True])
def test_checkpoints_that_a_driver_left_beside_a_committed_model_go_unless_they_are_kept(
    tmp_path: Path, config: SpinConfig, calm: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    """It was killed after its workers had committed the model."""
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"keep_checkpoints": keeps})})
    work = training.run_workers

    def killed_after_it(*given: Any, **named: Any) -> None:
        work(*given, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_workers", killed_after_it)
        with pytest.raises(KeyboardInterrupt):
            small_run.run(config, tmp_path / "run")
    assert list((tmp_path / "run/iter_000/checkpoints").rglob("*.distcp"))
    small_run.run(config, tmp_path / "run")
    assert (tmp_path / "run/iter_000/checkpoints").exists() == keeps
    assert committed(tmp_path / "run") == committed(calm)
