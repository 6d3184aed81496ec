"""Starts Ray on this machine, or joins a cluster."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import ray
import ray.cloudpickle
from ray._private import ray_constants

from spin_ray.config.recipe import SpinConfig
from spin_ray.runtime import garbage
from spin_ray.runtime.autoscaler import keep_ray_data_from_asking
from spin_ray.runtime.start_errors import check_answers, join_error, start_error


def connect(config: SpinConfig) -> None:
    """Joins the cluster at ``cluster.address`` or $RAY_ADDRESS; without either, starts an embedded Ray.

    Raises:
        ResourceError: no cluster answers within 10 s, or Ray cannot start here.
        StageError: Ray did not start, for an unknown reason.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    if not ray.is_initialized():
        address = config.cluster.address or os.environ.get("RAY_ADDRESS")
        place = f"cluster.address {address}" if config.cluster.address else f"RAY_ADDRESS {address}"
        options: dict[str, Any] = {"address": address} if address else {
            "address": "local", "num_cpus": config.cluster.local_cpus, "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }  # fmt: skip
        keep_to_loopback(not address)
        if not address:
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
            take_signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    keep_ray_data_from_asking()


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
