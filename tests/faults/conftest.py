"""The fakes of the unit tests serve here too."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from spin_ray.config.recipe import SpinConfig
from tests.support import small_run
from tests.support.learner_cases import one_rank


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
