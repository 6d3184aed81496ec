"""One local Ray for the folder."""

from collections.abc import Iterator

import pytest
import ray

from spin_ray.config.recipe import SpinConfig
from spin_ray.runtime.connect import connect


@pytest.fixture(scope="package")
def ray_ends_with_the_folder() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def local_ray(ray_ends_with_the_folder: None) -> None:
    """Starts Ray once, and once more after a module that had a cluster of its own."""
    cluster = {} if ray.is_initialized() else {"local_cpus": 2}
    connect(SpinConfig(model={"path": "-"}, data={"train": "-"}, cluster=cluster))
