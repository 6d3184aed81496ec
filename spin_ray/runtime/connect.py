"""Starts Ray on this machine, joins a cluster, or takes the Ray that this process is connected to."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.cloudpickle
from ray._common.utils import get_system_memory
from ray._private import ray_constants, services
from ray._private.utils import resolve_object_store_memory
from ray._private.worker import global_worker

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError
from spin_ray.runtime import garbage
from spin_ray.runtime.autoscaler import keep_ray_data_from_asking
from spin_ray.runtime.cgroups import memory_limit
from spin_ray.runtime.cpu import usable_cpus
from spin_ray.runtime.signals import ending_signals, exit_as_terminated
from spin_ray.runtime.start_errors import check_answers, check_loopback, join_error, start_error


def connect(config: SpinConfig) -> None:
    """Joins the cluster at ``cluster.address`` or $RAY_ADDRESS; without either, starts an embedded Ray.

    A process that is connected already stays connected.

    Raises:
        ConfigError: as ``refuse_other_ray`` does, or workers would import another version of this package.
        ResourceError: no cluster answers within 10 s, or Ray cannot start here.
        StageError: Ray did not start, for an unknown reason.
    """
    refuse_other_ray(config)
    if not ray.is_initialized():
        _refuse_other_source()
        address, place = _asked_address(config)
        options: dict[str, Any] = {"address": address} if address else {
            "address": "local", "num_cpus": config.cluster.local_cpus or usable_cpus(), "include_dashboard": False,
            "_node_ip_address": "127.0.0.1", **_memory_options(),
        }  # fmt: skip
        keep_to_loopback(not address)
        if not address:
            check_loopback()
            # ray.llm has a hook of its own, beside which its engines on GPUs fail.
            if not config.serving.resources.gpus:
                # By value, because Ray calls it before a new process can import this package.
                ray.cloudpickle.register_pickle_by_value(garbage)
                options["runtime_env"] = {"worker_process_setup_hook": garbage.collect_rarely}
            # Ray would start one process per CPU in advance, but without the hook, and so never use them.
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
            # Nobody announces a preemption of this machine; the watcher costs one process per worker group.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            # Hides Ray's warning that token authentication is on, which is intended (SECURITY.md).
            logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        else:
            # Number of attempts to connect, 41 s each; Ray's default is 20.
            os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
            check_answers(address, place)
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)
        except Exception as error:  # Ray raises many types, even plain Exception
            raise (join_error(error, place) if address else start_error(error)) from error
        if threading.current_thread() is threading.main_thread():
            for number in ending_signals():
                take_signal(number, exit_as_terminated)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    keep_ray_data_from_asking()


def _memory_options() -> dict[str, int]:
    """Returns the sizes that Ray would choose if it saw the limit of this process's own cgroup; empty where it does."""
    limit = memory_limit()
    if limit is None or limit >= get_system_memory():
        return {}
    store = max(resolve_object_store_memory(limit), ray_constants.OBJECT_STORE_MINIMUM_MEMORY_BYTES)
    return {"object_store_memory": store, "_memory": max(limit - store, store)}


def _asked_address(config: SpinConfig) -> tuple[str | None, str]:
    """Returns the address of the cluster to join, and its name in errors."""
    if config.cluster.address:
        return config.cluster.address, f"cluster.address {config.cluster.address}"
    address = os.environ.get("RAY_ADDRESS")
    return address, f"RAY_ADDRESS {address}"


def refuse_other_ray(config: SpinConfig) -> None:
    """Checks that the Ray of this process, if it is connected to one, is the one that the recipe asks for.

    Raises:
        ConfigError: the recipe names another cluster, or another number of CPUs for a Ray of its own.
    """
    if not ray.is_initialized():
        return
    connected = ray.get_runtime_context().gcs_address
    address, place = _asked_address(config)
    if address and not _is_same(address, connected):
        kind = "a Ray of its own" if is_embedded() else "the cluster"
        raise ConfigError(
            f"{place}: this process is connected to {kind} at {connected}; call ray.shutdown() first, or give no "
            "address to stay there"
        )
    cpus, wanted = ray.cluster_resources().get("CPU", 0), config.cluster.local_cpus
    if not address and wanted and wanted != cpus:
        raise ConfigError(
            f"cluster.local_cpus: {wanted} are for a new Ray, and this process is connected to one with {cpus:g} at "
            f"{connected}; call ray.shutdown() first, or leave local_cpus out to stay there"
        )


def _refuse_other_source() -> None:
    """Checks the current folder, in which Ray's workers look for modules first, unlike an installed command.

    Raises:
        ConfigError: it holds other source of this package.
    """
    own = Path(__file__).parents[1]
    try:
        found = Path.cwd() / own.name
    except FileNotFoundError:  # a current folder that was deleted
        return
    if (found / "__init__.py").is_file() and not found.samefile(own) and _source(found) != _source(own):
        raise ConfigError(
            f"{found}: is other source than the installed {own}, and Ray's workers would import it; change to another "
            "folder, or install this one (pip install -e .)"
        )


def _source(package: Path) -> dict[Path, bytes]:
    files = (path for path in package.rglob("*.py") if path.is_file())  # editors leave links that lead nowhere
    return {path.relative_to(package): path.read_bytes() for path in files}


def is_embedded() -> bool:
    """Returns True if this process started the Ray that it is connected to."""
    return global_worker.node is not None and global_worker.node.head


def _is_same(address: str, connected: str) -> bool:
    """Compares two addresses of a head, one given by the user, by port and by the machines that their hosts name."""
    if address in ("auto", "local") or address.startswith("ray://"):  # the port is that of Ray's client
        return is_embedded() == (address == "local")
    asked, found = services.parse_address(address), services.parse_address(connected)
    if asked is None or found is None or asked[1] != found[1]:
        return address == connected
    return bool(_machines(asked[0]) & _machines(found[0]))


def _machines(host: str) -> set[str]:
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return {host}
    loops = any(each.startswith("127.") or each == "::1" for each in found)
    return found | ({"127.0.0.1", services.get_node_ip_address()} if loops else set())


def take_signal(number: int, handle: Callable[[int, Any], None]) -> None:
    """Installs a handler without a time limit. Ray's core (abseil) would abort the process 3 s after SIGTERM."""

    def handle_in_peace(number: int, frame: Any) -> None:
        signal.alarm(0)
        handle(number, frame)

    signal.signal(number, handle_in_peace)


def keep_to_loopback(embedded: bool) -> None:
    """Keeps an embedded Ray on the loopback interface; undoes this for a cluster.

    Unless clusters are switched off, Ray replaces the loopback address by an outward one.
    """
    variable = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    if embedded:
        os.environ[variable] = "0"  # for the processes that Ray starts
    else:
        os.environ.pop(variable, None)
    ray_constants.ENABLE_RAY_CLUSTER = not embedded  # for this process, which has read the variable already
