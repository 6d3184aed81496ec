"""A second server on a cluster: Ray Serve itself would replace the first one without a word."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray import serve

from spin_ray.errors import ConfigError
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.serving.app import APP, keeper
from spin_ray.serving.incumbent import check_vacant, objection
from tests.support.fakes import config_of

pytestmark = pytest.mark.slow
OTHER = "/shared/runs/other"


@pytest.fixture
def serve_ends(local_ray: None) -> Iterator[None]:
    """Ends Ray Serve with its replicas' processes, which listen beyond loopback and outlive their actors' names."""
    yield
    serve.shutdown()
    deadline = time.monotonic() + 60
    while replicas := [process.pid for process in psutil.Process().children(recursive=True) if is_replica(process)]:
        assert time.monotonic() < deadline, f"waited 60 s for the processes {replicas}"
        time.sleep(0.1)


def is_replica(process: psutil.Process) -> bool:
    try:
        return "ServeReplica" in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


@pytest.mark.usefixtures("serve_ends")
def test_a_server_stays_unless_it_is_of_the_same_run_and_its_process_has_ended(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    RunDir(Storage(folder)).begin(config := config_of(serving={"models": ["iter-3"]}), {"start_model": "m"})
    serve.start(proxy_location="Disabled")
    check_vacant(folder)

    def deploy(driver: str | None) -> None:
        serve.run(keeper(folder, config, driver=driver), name=APP, route_prefix=None)

    deploy(ray.get_runtime_context().get_job_id())
    for run in (folder, OTHER):
        with pytest.raises(ConfigError, match=f"serves {folder} already, started by process {os.getpid()} on 127"):
            check_vacant(run)
    deploy(job_of_a_process_that_has_ended())
    check_vacant(folder)
    with pytest.raises(ConfigError, match=f"serves {folder} already, started by a process that has ended"):
        check_vacant(OTHER)
    deploy(None)
    with pytest.raises(ConfigError, match=f"serves {folder} already, deployed by a RayService"):
        check_vacant(folder)


def test_another_application_of_that_name_stays() -> None:
    assert (objection(OTHER, {}, [], "RUNNING") or "").startswith(
        "the cluster has an application spin-ray (RUNNING) that does not say which run it serves"
    )


def job_of_a_process_that_has_ended() -> str:
    address = ray.get_runtime_context().gcs_address
    code = f"import ray; ray.init({address!r}, log_to_driver=False); print(ray.get_runtime_context().get_job_id())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return ended.stdout.split()[-1]
