"""A user's own optimizer is tried as the backend will run it: on shards, and resumed from a checkpoint."""

import re
import sys
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
        ("OtherShapeLate", "makes state[parameter]['pair'] of shape (2,) after its first step"),
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


def test_a_process_group_that_exists_is_used_and_stays(tmp_path: Path) -> None:
    with one_rank(tmp_path):
        group = dist.group.WORLD
        try_optimizer(OptimizerConfig(name=f"{HERE}:CountsInGroups"), matrices_only=False, on_gpus=False)
        assert dist.group.WORLD is group
