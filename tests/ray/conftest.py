"""One local Ray for the folder."""

from collections.abc import Iterator

import pytest
import ray

from spin_ray.config import SpinConfig
from spin_ray.resources import connect


@pytest.fixture(scope="session", autouse=True)
def local_ray() -> Iterator[None]:
    connect(SpinConfig(model={"path": "-"}, data={"train": "-"}, cluster={"local_cpus": 2}))
    yield
    ray.shutdown()
