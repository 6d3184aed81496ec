"""The endpoint of one machine: this process answers, without Ray Serve's proxy."""

import logging
import socket
import threading
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import uvicorn
from ray._private.worker import global_worker

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ServingConfig
from spin_ray.errors import ConfigError, StageError
from spin_ray.serving.app import STOP_MARGIN_S, endpoint
from spin_ray.serving.heads import LimitedHeads
from spin_ray.serving.limits import access_log

LOG = "ingress_front.log"
"""File in ``logs/serve`` of Ray's session."""
_BACKLOG = 2048
_KEEP_ALIVE_S = 90
"""Seconds before an idle connection closes, as at Ray Serve's proxies; a proxy in front closes after 60 s."""
_LOG_BYTES = 100 * 2**20


def listen(serving: ServingConfig) -> socket.socket:
    """Opens the endpoint's port.

    Raises:
        ConfigError: the port is taken, or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in serving.host else socket.AF_INET
    try:
        return socket.create_server((serving.host, serving.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"serving.host {serving.host}, serving.port {serving.port}: {error.strerror}") from error


class Front:
    def __init__(self, run_folder: str, config: SpinConfig, keeper: Any, port: socket.socket) -> None:
        _log_beside_ray_serve()
        self.port = port.getsockname()[1]
        """The listening port, also if ``serving.port`` is 0."""
        self._stop_s = config.serving.request_timeout_s + STOP_MARGIN_S
        self._server = uvicorn.Server(
            uvicorn.Config(
                lambda: endpoint(run_folder, config, keeper),  # called in the server's event loop
                factory=True,
                http=LimitedHeads,
                ws="none",
                lifespan="on",
                log_config=None,
                log_level=logging.ERROR,  # its warnings are about clients that speak no HTTP
                access_log=False,  # ``Observe`` writes a better one
                server_header=False,
                proxy_headers=False,  # nothing here asks who is behind a proxy
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(self._stop_s),
            )
        )
        self._thread = threading.Thread(target=self._server.run, args=([port],), name="front", daemon=True)
        self._thread.start()

    @property
    def answers(self) -> bool:
        """Tells whether the server accepts requests; raises StageError if it has ended."""
        if not self._thread.is_alive():
            raise StageError("the HTTP server has ended; the lines above, or its log, say why")
        return self._server.started

    def stop(self) -> None:
        """Accepts no more requests and waits for running answers, each within its own time limit."""
        self._server.should_exit = True
        self._thread.join(self._stop_s + STOP_MARGIN_S)


def serve_logs() -> Path:
    """Returns the folder of Ray Serve's logs on this machine."""
    node: Any = global_worker.node
    return Path(node.get_logs_dir_path()) / "serve"


def _log_beside_ray_serve() -> None:
    folder = serve_logs()
    folder.mkdir(exist_ok=True)
    handler = RotatingFileHandler(folder / LOG, maxBytes=_LOG_BYTES, backupCount=5)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s"))
    serve_log = logging.getLogger("ray.serve")
    serve_log.handlers = [handler]
    serve_log.propagate = False
    access_log.setLevel(logging.INFO)
