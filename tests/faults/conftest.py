"""The fakes of the unit tests serve here too."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import small_run

from spin_ray.config import SpinConfig


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, process_group: None) -> SpinConfig:
    return small_run.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, config: SpinConfig) -> Path:
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("calm") / "run"
    with pytest.MonkeyPatch.context() as patch:
        small_run.in_this_process(patch)
        small_run.run(config, out)
    return out


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    small_run.in_this_process(monkeypatch)
