"""The server that a cluster has already. Ray Serve would put a new one silently in its place."""

from typing import Any

from ray import serve
from ray._private import state
from ray.serve.schema import ApplicationStatus

from spin_ray.errors import ConfigError
from spin_ray.serving.app import APP

_ANSWER_S = 5.0


def check_vacant(run_folder: str) -> None:
    """Checks that a new server ends no other one.

    A server of the same run is replaced if the process that started it has ended.

    Raises:
        ConfigError: the cluster has a server already.
    """
    incumbent = serve.status().applications.get(APP)
    if incumbent is None:
        return
    try:
        table = serve.get_deployment_handle("keeper", APP).table.remote(-1, 0.0).result(timeout_s=_ANSWER_S)
    except Exception:  # it starts or ends, or is an application of somebody else's
        table = {}
    if not table and incumbent.status == ApplicationStatus.DEPLOY_FAILED:
        return
    if reason := objection(run_folder, table, state.jobs(), incumbent.status.value):
        raise ConfigError(f"{reason}, or use another cluster")


def objection(run_folder: str, table: dict[str, Any], jobs: list[dict[str, Any]], status: str) -> str | None:
    """Returns why the server with this keeper's table must stay, and how to end it; None if it may be replaced.

    Args:
        run_folder: run that is to be served.
        table: ``{}`` if the keeper does not answer.
        jobs: Ray's table of drivers.
        status: Ray Serve's status of the incumbent.
    """
    run, driver = table.get("run"), table.get("driver")
    if run is None:
        return (
            f"the cluster has an application {APP} ({status}) that does not say which run it serves; end it with "
            "`serve shutdown`"
        )
    if driver is None:
        return f"the cluster serves {run} already, deployed by a RayService or `serve deploy`; change its `args` there"
    alive = next((job for job in jobs if job["JobID"] == driver and not job["IsDead"]), None)
    if alive:
        process = f"process {alive['DriverPid']} on {alive['DriverIPAddress']}"
        return f"the cluster serves {run} already, started by {process}; end it with Ctrl-C or SIGTERM there"
    if run != run_folder:
        return (
            f"the cluster serves {run} already, started by a process that has ended; end it with `serve shutdown`, "
            "which ends all of Ray Serve there"
        )
    return None
