"""The Ray Serve application.

client ─> Serve proxy ─> Ingress (keys, limits, names, OpenAI errors) ─> engine of an iterate (vLLM)
                            └─ reads the table of ─> Keeper (follows RUN/LATEST; starts, probes and retires engines)

On one machine ``front.Front`` replaces proxy and ingress.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from sqlalchemy import URL

from spin_ray.config.load import override
from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.errors import ConfigError
from spin_ray.run_dir.cache import cache_root
from spin_ray.run_dir.names import VOTES
from spin_ray.run_dir.run_dir import RunDir, open_run
from spin_ray.runtime.garbage import collect_as_usual
from spin_ray.serving.access import read_keys
from spin_ray.serving.api import make_app
from spin_ray.serving.arena.votes import VoteStore
from spin_ray.serving.engines import ServeEngines
from spin_ray.serving.events import LAST_EVENTS_S
from spin_ray.serving.keeper import ENGINE_PREFIX, Keeper

APP = "spin-ray"
STOP_MARGIN_S = 2 * LAST_EVENTS_S
"""Seconds after ``serving.request_timeout_s`` until every connection has ended: for last events, then for the close."""


@serve.ingress()
class Ingress:
    async def __init__(self, run_folder: str, config: SpinConfig, keeper: Any) -> None:
        await keeper.table.remote(-1, 0.0)  # waits until the keeper is ready, without which no model is known
        self._arguments = (run_folder, config, keeper)

    def __serve_build_asgi_app__(self) -> Any:
        return endpoint(*self._arguments, proxied=True)


def endpoint(run_folder: str, config: SpinConfig, keeper: Any, *, proxied: bool = False) -> FastAPI:
    """Builds the HTTP interface to a keeper's engines. Its lifespan follows the keeper and closes the votes."""
    engines = ServeEngines(keeper, sees_all=config.serving.ingress_replicas == 1)
    keys = read_keys(config.serving.keys) if config.serving.keys else []
    votes = VoteStore(votes_url(run_folder, config))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(engines.follow())
        try:
            yield
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            votes.close()

    collect_as_usual()
    return make_app(engines, config, keys, votes, proxied=proxied, run=open_run(run_folder), lifespan=lifespan)


def application(
    run_folder: str, config: SpinConfig, driver: str | None = None, *, holds: bool = False
) -> serve.Application:
    """Builds ingress and keeper; ``driver`` and ``holds`` are the keeper's."""
    serving = config.serving
    ingress: Any = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=serving.ingress_replicas,
        max_surge_percent=100,  # a changed config's replicas start beside those that answer
        max_ongoing_requests=10 * serving.max_concurrent,  # refusals must not wait behind answers
        graceful_shutdown_timeout_s=serving.request_timeout_s + STOP_MARGIN_S,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},  # ``Observe`` writes a better one
    )
    return ingress.bind(run_folder, config, keeper(run_folder, config, driver=driver, holds=holds))


def keeper(
    run_folder: str,
    config: SpinConfig,
    engines: str = ENGINE_PREFIX,
    driver: str | None = None,
    *,
    holds: bool = False,
) -> serve.Application:
    """Builds the keeper alone, with the arguments of ``Keeper``."""
    deployment: Any = serve.deployment(
        Keeper, name="keeper", num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0}
    )
    return deployment.bind(run_folder, config, engines, driver, holds)


def build(args: dict[str, Any]) -> serve.Application:
    """Builds the application for a RayService's ``serveConfigV2``.

    ``args`` has ``run`` (the run folder) and settings such as ``serving.models: all``.

    Raises:
        UserError: the run or the settings cannot be used, or ``serving.keys`` is missing.
    """
    settings = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in args.items() if key != "run"
    }
    run = open_run(args["run"])
    config = override(run.config(), settings)
    check_devices(config)
    if not config.serving.keys:
        raise ConfigError("serving.keys: is needed here, as a cluster's proxies listen beyond their machine")
    if not config.serving.votes and "://" in str(run.storage.root):
        raise ConfigError("serving.votes: is needed here, as a store holds no database and a pod keeps no file")
    # KubeRay sends clients to a new cluster as soon as its applications run, and ends the old one.
    return application(str(run.storage.root), config, holds=True)


def check_devices(config: SpinConfig) -> None:
    """Raises ConfigError unless ``serving.resources.gpus`` is the engine's, or at most 1 for an engine of one part."""
    section = "serving.engine" if config.serving.engine else "generation.engine"
    engine, gpus = config.serving_engine, config.serving.resources.gpus
    if gpus != engine.devices and (gpus > 1 or engine.devices > 1):
        raise ConfigError(
            f"serving.resources.gpus: {gpus:g}, but {section} has tensor_parallel_size {engine.tensor_parallel_size} × "
            f"pipeline_parallel_size {engine.pipeline_parallel_size}; set it to {engine.devices}, or give "
            "serving.engine other sizes"
        )


def votes_url(run_folder: str, config: SpinConfig) -> str | URL:
    """Returns the votes' database; for a run in an object store, a file in this machine's cache."""
    if config.serving.votes:
        return config.serving.votes
    folder = Path(run_folder)
    if "://" in run_folder:
        folder = cache_root() / "votes" / digest(run_folder)[:16]
        folder.mkdir(parents=True, exist_ok=True)
    return URL.create("sqlite", database=str(folder / VOTES))


def open_votes(run: RunDir, url: str | None) -> VoteStore:
    """Opens the votes of a run without its server, at ``url`` if given; raises UserError if there is no database."""
    return VoteStore(url or votes_url(str(run.storage.root), run.config()), new=False)
