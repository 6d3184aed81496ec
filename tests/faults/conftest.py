"""The fakes of the unit tests serve here too."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
import small_run

from spin_ray.config import SpinConfig


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """A process group of this process alone, as a train worker has."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(folder / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> SpinConfig:
    return small_run.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, config: SpinConfig) -> Path:
    """The run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch, one_rank(folder):
        small_run.in_this_process(patch)
        small_run.run(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[None]:
    """Of each module of this folder; the unit tests have groups of their own."""
    request.getfixturevalue("calm")
    with one_rank(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    small_run.in_this_process(monkeypatch)
