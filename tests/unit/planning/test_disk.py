"""Room on disks: predicted bytes against those that a backend writes, and what a start says of too little."""

import logging
import shutil
from collections import namedtuple
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ResourceError
from spin_ray.inputs.embedded import resolve
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.loop import doctor, launch
from spin_ray.planning.disk import check_room, disk_use, parameters_of
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support.fakes import config_of
from tests.support.learner_cases import one_rank

START = Path(resolve("embedded:tiny-llama"))
Room = namedtuple("Room", "total used free")


def config(precision: str = "fp32", iterations: int = 3, **train: object) -> SpinConfig:
    return config_of(iterations=iterations, train={"precision": precision, **train})


def bytes_of(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "rmsprop")])
def test_what_a_backend_writes_was_predicted(tmp_path: Path, precision: str, optimizer: str) -> None:
    recipe = config(precision, optimizer={"name": optimizer})
    use = disk_use(recipe, parameters_of(START))
    settings = BackendSettings(
        max_length=32, precision=precision, optimizer=recipe.train.optimizer, learning_rate=1e-3, total_steps=1
    )
    with one_rank(tmp_path):
        backend = Fsdp2Backend(START, settings, torch.device("cpu"))
        backend.save(tmp_path / "checkpoint")
        backend.export_hf(tmp_path / "model")
    assert bytes_of(tmp_path / "checkpoint") == pytest.approx(next(iter(use.checkpoints)), rel=0.1)
    assert bytes_of(tmp_path / "model", "*.safetensors") == pytest.approx(use.model, rel=0.02)


def test_a_run_counts_what_is_still_to_be_made() -> None:
    whole = disk_use(config("bf16"), 1e9)
    assert (whole.models, whole.model, whole.checkpoints) == (3, 2e9, {8e9: 2})
    assert disk_use(config("bf16"), 1e9, done=2).models == 1
    kept = config_of(iterations=3, train={"precision": "bf16"}, storage={"keep_checkpoints": True})
    assert disk_use(kept, 1e9).checkpoints == {8e9: 4}
    adapters = disk_use(config("bf16", lora={"rank": 8, "merge": False}), 1e9)
    assert (adapters.most, str(adapters)) == (0, "adapters alone")
    merged = disk_use(config("bf16", lora={"rank": 8}), 1e9)
    assert (merged.models, merged.checkpoints) == (3, {})


def test_the_warm_up_writes_a_model_and_checkpoints_of_all_weights() -> None:
    """Per parameter: 2 bytes of bf16; checkpoints of 12 with the warm-up's AdamW and of 8 with RMSprop."""
    use = disk_use(config_of(iterations=3, sft={}, train={"precision": "bf16"}), 1e9)
    assert (use.models, use.checkpoints) == (4, {12e9: 2})
    adapters = {"precision": "bf16", "lora": {"rank": 8, "merge": False}}
    alone = disk_use(config_of(sft={}, train=adapters), 7.24e9)
    assert str(alone) == "1 × 14.5 GB of whole models and 2 × 86.9 GB of checkpoints while training"
    assert disk_use(config_of(sft={}, train=adapters), 1e9, tuned=["sft"]).most == 0
    kept = config_of(iterations=3, sft={}, train={"precision": "bf16"}, storage={"keep_checkpoints": True})
    assert disk_use(kept, 1e9).checkpoints == {12e9: 1, 8e9: 4}


def test_the_reviser_is_a_whole_model_too() -> None:
    recipe = config_of(algorithm="seft", iterations=3, sft={}, reviser={}, train={"precision": "bf16"})
    assert disk_use(recipe, 1e9).models == 5
    assert disk_use(recipe, 1e9, done=1, tuned=["sft", "reviser"]).models == 2


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    def have(free: float, total: float = 1e13) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Room(total, total - free, free))

    return have


def test_a_disk_without_room_for_one_model_is_refused_and_one_that_may_become_full_is_told(tmp_path, free) -> None:
    use, out = disk_use(config("bf16", optimizer={"name": "rmsprop"}), 7e9), tmp_path / "run"
    free(13e9)
    with pytest.raises(ResourceError, match=r"13 GB are free there, and a model takes 14 GB; free some"):
        check_room(use, out)
    free(150e9)
    told = check_room(use, out)
    assert told and told.startswith(f"{out}: 150 GB are free there, and the run may need 154.0 GB (3 × 14.0 GB of")
    free(160e9)
    assert check_room(use, out) is None
    free(0, total=0)
    assert check_room(use, out) is None


def test_a_start_says_so(tmp_path: Path, free, caplog: pytest.LogCaptureFixture) -> None:
    parameters = parameters_of(START)
    free(4 * parameters + 1)
    with caplog.at_level(logging.WARNING):
        launch._check_room(RunDir(Storage(tmp_path)), config(), START)
    assert "the run may need" in caplog.text
    free(4 * parameters - 1)
    with pytest.raises(ResourceError, match="a model takes"):
        launch._check_room(RunDir(Storage(tmp_path)), config(), START)


def test_a_start_counts_the_warm_up_until_its_model_is_committed(tmp_path: Path, free, caplog) -> None:
    recipe = config_of(sft={}, train={"precision": "fp32", "lora": {"rank": 8, "merge": False}})
    run = RunDir(Storage(tmp_path))
    free(4 * parameters_of(START) + 1)
    with caplog.at_level(logging.WARNING):
        launch._check_room(run, recipe, START)
        assert "the run may need" in caplog.text
        caplog.clear()
        run.whole_model(0).commit({}, {}, {})
        launch._check_room(run, recipe, START)
    assert not caplog.text


def test_doctor_counts_what_is_left_as_a_start_does(tmp_path: Path, free) -> None:
    recipe = config_of(sft={}, train={"precision": "fp32", "lora": {"rank": 8, "merge": False}})
    run, said = RunDir(Storage(tmp_path)), []
    free(4 * parameters_of(START) + 1)
    for _ in range(2):
        console = Console(file=StringIO(), width=400)
        doctor._print_room(recipe, "fp32", START, str(tmp_path), console)
        said.append("the run may need" in console.file.getvalue())  # type: ignore[attr-defined]
        run.whole_model(0).commit({}, {}, {})
    assert said == [True, False]
