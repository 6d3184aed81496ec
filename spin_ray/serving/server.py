"""``spin-ray serve``, which finishes its answers before it stops."""

import logging
import os
import queue
import signal
from contextlib import ExitStack

import ray
from ray import serve
from ray.exceptions import RayError

from spin_ray.config.packages import check_installed
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, ResourceError, StageError, last_line
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.runtime.connect import connect, take_signal
from spin_ray.runtime.cpu import usable_cpus
from spin_ray.runtime.engine_names import check_serving_engine
from spin_ray.runtime.gpu import check_serving_build, runs_elsewhere
from spin_ray.runtime.placement import missing, node_resources
from spin_ray.runtime.signals import ending_signals
from spin_ray.serving.access import LOOPBACK, guard_ray_token, read_keys
from spin_ray.serving.app import APP, STOP_MARGIN_S, application, check_devices, keeper, votes_url
from spin_ray.serving.arena.votes import VoteStore
from spin_ray.serving.front import Front, listen
from spin_ray.serving.incumbent import check_vacant
from spin_ray.serving.iterates import check_models, wanted
from spin_ray.serving.keeper import ENGINE_PREFIX
from spin_ray.serving.progress import Progress
from spin_ray.serving.stopping import stop_serving

logger = logging.getLogger(__name__)


def serve_run(run: RunDir, config: SpinConfig) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP.

    Raises:
        UserError: settings, keys, run or cluster cannot be used.
        StageError: the server did not start, or was deleted.
    """
    check_settings(run, config)
    stop: queue.SimpleQueue[int] = queue.SimpleQueue()  # no Event: two signals at once could lock it
    front = start(run, config)
    for number in (signal.SIGINT, *ending_signals()):  # not earlier: Ray sets its own at its start
        take_signal(number, lambda number, _: stop.put(number))
    try:
        Progress(config.serving, front).follow(stop)
    finally:
        longest_s = config.serving.request_timeout_s + STOP_MARGIN_S
        stop_serving(APP, ENGINE_PREFIX, longest_s, stop, first=front.stop if front else None)


def check_settings(run: RunDir, config: SpinConfig) -> None:
    """Checks the settings before anything starts.

    Raises:
        UserError: an unknown model name, unusable keys or votes, a reachable port without keys, GPUs but a vLLM for
            CPUs, another number of GPUs than an engine's parts, or RAY_AUTH_MODE without tokens.
    """
    serving = config.serving
    check_models(run, serving.models)
    check_serving_build(config)
    if not runs_elsewhere(config):
        check_installed("serving", "gpu" if serving.resources.gpus else "cpu")
        check_serving_engine(config)
    check_devices(config)
    if serving.keys:
        read_keys(serving.keys)
    VoteStore(votes_url(str(run.storage.root), config)).close()
    if serving.host not in LOOPBACK and not serving.keys:
        raise ConfigError(f"serving.host: {serving.host} can be reached from elsewhere; set serving.keys first")
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise ConfigError(
            "Ray Serve's replicas take work from other machines, wherever serving.host is, and from anybody with "
            f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}; set it to token"
        )


def start(run: RunDir, config: SpinConfig) -> Front | None:
    """Opens the endpoint and returns; engines start in the background.

    Returns None if Ray Serve's proxies are the endpoint: on a cluster, or with several ingress replicas.

    Raises:
        UserError: no cluster answers, it serves already, or it could not serve safely.
        StageError: Ray Serve's proxy did not start.
    """
    serving, folder = config.serving, str(run.storage.root)
    if not runs_elsewhere(config):
        with ExitStack() as held:
            port = held.enter_context(listen(serving))
            if serving.ingress_replicas == 1:
                connect_for(run, config)
                serve.start(proxy_location="Disabled")
                front = Front(folder, config, serve.run(keeper(folder, config), name=APP, route_prefix=None), port)
                held.pop_all()
                return front
    if serving.port == 0:
        raise ConfigError("serving.port: 0 is for one ingress on this machine; give Ray Serve's proxies a port")
    connect_for(run, config)
    check_vacant(folder)
    if serve.status().proxies and not serving.keys:
        raise ConfigError("Ray Serve runs on this cluster already, at an address of its own; set serving.keys first")
    try:
        serve.start(
            http_options={
                "host": serving.host, "port": serving.port, "request_timeout_s": serving.request_timeout_s + 30,
            }
        )  # fmt: skip
    except (RayError, TimeoutError) as error:
        raise StageError(f"Ray Serve's proxy did not start ({last_line(error)}); is the machine overloaded?") from error
    serve.run(application(folder, config, ray.get_runtime_context().get_job_id()), name=APP, route_prefix="/")
    return None


def connect_for(run: RunDir, config: SpinConfig) -> None:
    """Joins the cluster, or starts an embedded Ray with room for the engines.

    Raises:
        ResourceError: no cluster answers, or no node could hold an engine.
    """
    # By default Ray Serve kills a proxy that takes longer than 15 s to start.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "50")
    guard_ray_token(embedded=not runs_elsewhere(config))
    engines = 1 if config.commits_adapters else len(wanted(run, config.serving.models)[0])
    connect(config if ray.is_initialized() else with_room(config, engines))
    check_room(config)


def check_room(config: SpinConfig) -> None:
    """Raises ResourceError if the nodes could not hold an engine, each pipeline stage on one node."""
    resources, engine = config.serving.resources, config.serving_engine
    stages = engine.pipeline_parallel_size
    stage = {name: amount / stages for name, amount in resources.bundle.items()}
    if lack := missing([stage] * stages, node_resources(resources.labels)):
        on = f" on nodes labelled {resources.labels}" if resources.labels else ""
        raise ResourceError(f"serving.resources: {lack}{on}; lower it or add nodes")


def with_room(config: SpinConfig, engines: int) -> SpinConfig:
    """Sets the CPUs of an embedded Ray, for all engines and one successor."""
    if config.cluster.local_cpus:
        return config
    needed = int((engines * config.serving.most_engines + 1) * config.serving.resources.cpus + 1)
    cpus = max(usable_cpus(), needed)
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"local_cpus": cpus})})
