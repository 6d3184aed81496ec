"""A user's own optimizer is tried as the backend will run it: on shards, and resumed from a checkpoint."""

import os
import re
import resource
import sys
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist

from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ConfigError
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.trials import try_optimizer
from tests.support import own_optimizers
from tests.support.learner_cases import one_rank

HERE = own_optimizers.__name__


class OfFsdp2(Fsdp2Backend):
    """A backend of the user's."""


def trial(name: str, backend: str = "fsdp2", *, on_gpus: bool = False, workers: int = 1) -> None:
    path, hook = name if ":" in name else f"{HERE}:{name}", sys.excepthook
    try:
        try_optimizer(
            OptimizerConfig(name=path), matrices_only=False, on_gpus=on_gpus, backend=backend, workers=workers
        )
    finally:
        assert not dist.is_initialized()
        assert sys.excepthook is hook  # torch's own writes [rank0] before each line of an error


@pytest.mark.parametrize("name", ["CountsInGroups", "StartsLate", "TwoModes", "Noisy", "torch.optim:NAdam"])
def test_an_optimizer_that_goes_on_as_before_is_taken(name: str) -> None:
    trial(name)


@pytest.mark.parametrize("on_gpus", [False, True])
@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("CountsInItself", "does not hold self.count; keep it in state[parameter] or param_groups"),
        ("CountsForAll", "does not hold state['all']; keep it in"),
        ("CountsOutside", "does not hold something that it keeps elsewhere; keep it in"),
        (
            "RoundsAtRandom",
            "self.noise (a torch.Generator); keep it in state[parameter] or param_groups, and draw random",
        ),
        ("OtherShapeLate", "makes state[parameter]['pair'] of shape (2,) after its first step"),
        ("AveragesLate", "makes param_groups[0]['ema'] of shape (3,) after its first step"),
        ("CountsLate", "makes param_groups[0]['late']['count'] after its first step"),
    ],
)
def test_an_optimizer_that_goes_on_otherwise_after_a_checkpoint_is_told_what_was_lost(
    name: str, lost: str, on_gpus: bool
) -> None:
    with pytest.raises(ConfigError, match=rf"^optimizer\.name: {HERE}:{name} .*{re.escape(lost)}"):
        trial(name, on_gpus=on_gpus)


@pytest.mark.parametrize("on_gpus", [False, True])
@pytest.mark.parametrize("name", ["torch.optim:Adafactor", "torch.optim:Rprop", "PlainRows"])
def test_an_optimizer_that_fails_on_shards_is_refused_for_fsdp2_alone(name: str, on_gpus: bool) -> None:
    with pytest.raises(ConfigError, match=r"works on plain tensors, but fails on DTensors.* take another, or have it"):
        trial(name, on_gpus=on_gpus)
    with pytest.raises(ConfigError, match="fails on DTensors"):
        trial(name, f"{__name__}:OfFsdp2", on_gpus=on_gpus)
    trial(name, "deepspeed", on_gpus=on_gpus)
    trial(name, "collections:Counter", on_gpus=on_gpus)


def test_an_optimizer_with_modes_is_for_fsdp2() -> None:
    with pytest.raises(ConfigError, match=r"has eval\(\), which train.backend: deepspeed does not call"):
        trial("TwoModes", "deepspeed")


def test_plain_state_of_the_local_shard_is_for_one_worker() -> None:
    """A checkpoint holds a plain tensor once, and each of several workers has another."""
    trial("LocalMomentum")
    with pytest.raises(ConfigError, match=r"keeps state\[parameter\]\['sum'\] as a plain tensor of each worker"):
        trial("LocalMomentum", workers=2)
    trial("CountsInGroups", workers=2)


def test_plain_factors_of_the_local_rows_are_for_one_worker() -> None:
    trial("LocalRows")
    with pytest.raises(ConfigError, match=r"keeps state\[parameter\]\['rows'\] as a plain tensor of each worker"):
        trial("LocalRows", workers=2)


def test_a_group_that_cannot_be_pickled_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"no checkpoint can hold or restore \(.*<lambda>.*\); keep") as caught:
        trial("KeepsAFunction")
    assert "\n" not in str(caught.value) and "DTensors" not in str(caught.value)


def test_a_full_disk_is_not_blamed_on_the_optimizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        with pytest.raises(ConfigError) as caught:
            trial("CountsInGroups")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).startswith(
        f"{tmp_path}: the checkpoint of a trial of optimizer.name: {HERE}:CountsInGroups"
    )
    assert "File too large" in str(caught.value) and "\n" not in str(caught.value)


def test_a_temporary_folder_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"missing: the checkpoint of a trial .*set \$TMPDIR to another folder"):
        trial("CountsInGroups")


@pytest.mark.parametrize("is_set", [False, True])
def test_the_environment_stays_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_set: bool) -> None:
    variable, before = "TORCHINDUCTOR_CACHE_DIR", str(tmp_path) if is_set else None
    monkeypatch.delenv(variable, raising=False)
    if before:
        monkeypatch.setenv(variable, before)
    trial("Compiles", "deepspeed")
    assert os.environ.get(variable) == before


def test_a_process_group_that_exists_is_used_and_stays(tmp_path: Path) -> None:
    with one_rank(tmp_path):
        group = dist.group.WORLD
        try_optimizer(OptimizerConfig(name=f"{HERE}:CountsInGroups"), matrices_only=False, on_gpus=False)
        assert dist.group.WORLD is group
