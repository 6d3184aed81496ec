"""``POST /v1/compare`` for a file of prompts, without an HTTP server."""

import asyncio
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError
from ray import serve

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, DataError, StageError
from spin_ray.run_dir.names import LATEST
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.serving.app import keeper
from spin_ray.serving.bodies import CompareBody
from spin_ray.serving.compare import compare
from spin_ray.serving.engines import Engines, ServeEngines
from spin_ray.serving.errors import Refusal, from_validation
from spin_ray.serving.iterates import ALL, wanted
from spin_ray.serving.keeper import ENGINE_PREFIX
from spin_ray.serving.names import UnknownModel
from spin_ray.serving.server import check_settings, connect_for
from spin_ray.serving.stopping import stop_serving


def compare_file(run: RunDir, config: SpinConfig, prompts: Path, options: dict[str, Any], out: IO[str]) -> int:
    """Writes one JSON line per row of ``prompts``, in order; returns the number of rows.

    ``options`` are fields of ``CompareBody``; row i gets seed ``options["seed"]`` + i.

    Raises:
        UserError: a row or a setting cannot be used, or a model is not published.
        StageError: an engine did not start.
    """
    check_settings(run, config)
    check_published(run, options["models"])
    bodies = list(read_rows(prompts, options))
    if not bodies:
        raise DataError(f"{prompts}: has no rows")
    connect_for(run, config)
    serve.start(proxy_location="Disabled")
    app = f"spin-ray-compare-{secrets.token_hex(4)}"  # not a server's name: one may run on this cluster
    engines = f"{app}.{ENGINE_PREFIX}"
    try:
        handle = serve.run(keeper(str(run.storage.root), config, engines), name=app, route_prefix=None)
        asyncio.run(_with_engines(handle, run, config, bodies, out))
    finally:
        stop_serving(app, engines, config.serving.request_timeout_s)
    return len(bodies)


def check_published(run: RunDir, models: list[str]) -> None:
    """Raises ConfigError if a model is not published; a server would wait for it."""
    there = [*wanted(run, (ALL,))[0], LATEST]
    if missing := [name for name in models if name not in there]:
        raise ConfigError(
            f"--models: {run.storage.root} has not published {', '.join(missing)}; it has {', '.join(there)}"
        )


def read_rows(file: Path, options: dict[str, Any]) -> Iterator[CompareBody]:
    """Reads rows with ``messages`` or ``prompt``; drops a last message of the assistant.

    Raises:
        DataError: the file or a row cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split texts, at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    for number, line in enumerate(line for line in lines if line.strip()):
        try:
            row = json.loads(line)
            messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
            asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            yield CompareBody.model_validate(options | {"messages": asked, "seed": options["seed"] + number})
        except ValidationError as error:
            raise DataError(f"{file}: row {number + 1}: {from_validation(error.errors())}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{file}: row {number + 1}: needs messages, or prompt") from error


async def compare_rows(
    engines: Engines, config: SpinConfig, bodies: list[CompareBody], out: IO[str], run: RunDir | None = None
) -> None:
    """Writes one line per body, in order; the line of a refused body has an error."""
    room = asyncio.Semaphore(max(1, config.serving.max_concurrent // 2))

    async def one(body: CompareBody) -> dict[str, Any]:
        async with room:
            try:
                return await compare(engines, body, config, run)
            except Refusal as refusal:
                return {"object": "comparison", "seed": body.seed, **refusal.content()}

    tasks = [asyncio.create_task(one(body)) for body in bodies]
    for body, task in zip(bodies, tasks, strict=True):
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        out.write(json.dumps({"messages": messages} | await task, ensure_ascii=False) + "\n")


async def _with_engines(handle: Any, run: RunDir, config: SpinConfig, bodies: list[CompareBody], out: IO[str]) -> None:
    engines = ServeEngines(handle, sees_all=True)
    following = asyncio.get_running_loop().create_task(engines.follow())
    try:
        await _wait_for(engines, bodies[0].models, config.serving.start_timeout_s)
        await compare_rows(engines, config, bodies, out, run)
    finally:
        following.cancel()


async def _wait_for(engines: ServeEngines, models: list[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            for model in models:
                engines.names.resolve(model)
            return
        except UnknownModel as unknown:
            if engines.problems:
                raise StageError("; ".join(f"{name}: {reason}" for name, reason in engines.problems.items())) from None
            if time.monotonic() > deadline:
                raise StageError(f"{unknown}; waited serving.start_timeout_s for the engines") from unknown
        await asyncio.sleep(0.2)
