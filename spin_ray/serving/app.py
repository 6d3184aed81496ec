"""The Ray Serve application: an ingress that checks and routes, and a keeper that runs the engines.

    client ─> Serve proxy ─> Ingress (keys, limits, names, OpenAI errors) ─> engine of an iterate (vLLM)
                                  └── hears from ── Keeper (follows RUN/LATEST, starts, probes and retires engines)

``spin-ray serve RUN`` starts it; a RayService names ``spin_ray.serving.app:build`` in its ``serveConfigV2``.
"""

import asyncio
import json
from typing import Any

from ray import serve
from sqlalchemy import URL

from spin_ray.config.load import override
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.serving.access import read_keys
from spin_ray.serving.api import make_app
from spin_ray.serving.arena.votes import VoteStore
from spin_ray.serving.engines import ServeEngines
from spin_ray.serving.keeper import ENGINE_PREFIX, Keeper

APP = "spin-ray"
"""Name of the application."""


@serve.ingress()
class Ingress:
    """One replica of the HTTP interface."""

    def __init__(self, run_folder: str, config: SpinConfig, keeper: Any) -> None:
        self._config = config
        self._engines = ServeEngines(keeper)
        self._keys = read_keys(config.serving.keys) if config.serving.keys else []
        self._votes = VoteStore(votes_url(run_folder, config))

    def __serve_build_asgi_app__(self) -> Any:
        self._following = asyncio.get_running_loop().create_task(self._engines.follow())
        return make_app(self._engines, self._config, self._keys, self._votes)


def application(run_folder: str, config: SpinConfig) -> serve.Application:
    """Builds the application of a run, with the ``serving`` section of ``config``."""
    serving = config.serving
    ingress: Any = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=serving.ingress_replicas,
        max_ongoing_requests=10 * serving.max_concurrent,  # refusals are quick, and must not wait behind answers
        graceful_shutdown_timeout_s=serving.request_timeout_s,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},  # the ingress writes one with models and key names
    )
    return ingress.bind(run_folder, config, keeper(run_folder, config))


def keeper(run_folder: str, config: SpinConfig, engines: str = ENGINE_PREFIX) -> serve.Application:
    """Builds the keeper alone; the names of its engines' applications begin with ``engines``."""
    deployment: Any = serve.deployment(
        Keeper, name="keeper", num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0}
    )
    return deployment.bind(run_folder, config, engines)


def build(args: dict[str, Any]) -> serve.Application:
    """Builds the application for ``serveConfigV2``.

    ``args`` has ``run`` (the folder) and settings such as ``serving.models: all``.

    Raises:
        UserError: the run or the settings cannot be used, or there are no keys.
    """
    settings = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in args.items() if key != "run"
    }
    run = RunDir(Storage(args["run"]))
    config = override(run.config(), settings)
    if not config.serving.keys:
        raise ConfigError("serving.keys: is needed here, as a cluster's proxies listen beyond their machine")
    return application(str(run.storage.root), config)


def votes_url(run_folder: str, config: SpinConfig) -> str | URL:
    """Returns the database of the votes: ``serving.votes``, else a file in the run."""
    return config.serving.votes or URL.create("sqlite", database=f"{run_folder}/votes.sqlite")
