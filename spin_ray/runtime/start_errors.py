"""One-line errors, each with a remedy, for a Ray that does not start or cannot be joined."""

import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import cache_from_source
from pathlib import Path

import ray
from ray._private import services

from spin_ray.errors import ResourceError, StageError, last_line

ANSWER_S = 10.0
"""Longest wait for a connection, in seconds. A head that is starting needs a few."""

_LOOPBACK = "127.0.0.1"
_LOOPBACK_S = 5.0
_SHARED_MEMORY = (
    "shared memory (/dev/shm) is too small for its object store; give the container more, e.g. docker run "
    "--shm-size=8g or, in Kubernetes, an emptyDir of medium Memory at /dev/shm"
)
_START_CURES: tuple[tuple[str, Callable[[], str]], ...] = (
    (
        r"AF_UNIX path length",
        lambda: (
            f"its sockets lie in {_folder()}, whose path is too long for them; "
            "set TMPDIR or RAY_TMPDIR to a short path, e.g. RAY_TMPDIR=/tmp"
        ),
    ),
    (
        r"timed out|[Tt]imeout|TimeoutError|may not have started|GCS has become overloaded",
        lambda: (
            f"its processes took longer than the 30 s that it gives them, as on a busy machine{_slow_imports()}; "
            "run the command again when the machine has less to do, or start Ray by `ray start --head` "
            "and give --cluster.address=auto"
        ),
    ),
    (r"/dev/shm|minimum allowed is", lambda: _SHARED_MEMORY),
    (
        r"No space left|ENOSPC|Disk quota",
        lambda: f"the disk of {_folder()} is full; free some space there or set RAY_TMPDIR to another folder",
    ),
    (
        r"(Permission denied|Read-only file system)[^\n]*/\.ray\b",
        lambda: "it may not write its token to ~/.ray; set RAY_AUTH_TOKEN to a secret, or HOME to a folder of your own",
    ),
    (
        r"Permission denied|Read-only file system|No usable temporary",
        lambda: f"it may not write to {_folder()}/ray; set RAY_TMPDIR to a folder of your own with a short path",
    ),
    (
        r"[Aa]ddress already in use|already occupied|Failed to bind",
        lambda: "a port that it needs is taken; end the program that listens there (`ray stop` ends an older Ray)",
    ),
    (r"Too many open files", lambda: "too few files may be open at once; raise the limit, e.g. ulimit -n 65536"),
    (
        r"can't start new thread|Resource temporarily unavailable|Cannot allocate memory",
        lambda: (
            "this machine gives it no further process, thread or memory; raise the limit (ulimit -u, the "
            "container's pids and memory) or end other programs"
        ),
    ),
)


def start_error(error: BaseException) -> Exception:
    """Returns the error of an embedded Ray that did not start."""
    text = _whole_text(error)
    for words, cure in _START_CURES:
        if re.search(words, text):
            return ResourceError(f"Ray did not start on this machine: {cure()}")
    return StageError(
        f"Ray did not start on this machine: {_told(error)}; its logs are in {_folder()}/ray/session_latest/logs; "
        "run the command again"
    )


def check_loopback() -> None:
    """Tests a connection within this machine, without which an embedded Ray would hang.

    Raises:
        ResourceError: there is none.
    """
    try:
        with socket.create_server((_LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_S).close()
    except OSError as error:
        raise ResourceError(
            f"Ray did not start on this machine: {_LOOPBACK} cannot be reached ({error.strerror or error}); bring up "
            "the loopback interface (ip link set lo up)"
        ) from error


def join_error(error: BaseException, place: str) -> Exception:
    """Returns the error of a cluster that could not be joined; ``place`` names its address."""
    text = _whole_text(error)
    if "ersion mismatch" in text:
        return ResourceError(f"{place}: {_mismatch(text)}; use the cluster's versions here, or its image for the job")
    if re.search(r"[Uu]nauthenticated|[Aa]uthentication|InvalidToken", text):
        return ResourceError(
            f"{place}: wants another token than this process has; set RAY_AUTH_MODE and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH) as on the cluster"
        )
    if isinstance(error, ValueError) and re.search(r"[Aa]ddress|[Mm]alformed|host", text):
        return ResourceError(
            f"{place}: is no address ({_told(error)}); give HOST:PORT, with the port of the head, or auto"
        )
    return ResourceError(f"{place}: cannot be reached ({_told(error)}); is its head running (`ray status` there)?")


def check_answers(address: str, place: str) -> None:
    """Tests a connection to ``address``, because Ray itself would try for 41 s.

    Raises:
        ResourceError: no connection within ``ANSWER_S`` seconds, or an invalid address.
    """
    try:
        bootstrap = services.canonicalize_bootstrap_address(address.removeprefix("ray://"))
        if bootstrap is None:  # `auto` where no Ray has run: Ray says so at once
            return
        host, port = services.parse_address(bootstrap)
        where = (host, int(port))
    except Exception as error:
        raise ResourceError(
            f"{place}: is no address ({last_line(error)}); give HOST:PORT, with the port of the head, or auto"
        ) from error
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            socket.create_connection(where, timeout=max(0.1, deadline - time.monotonic())).close()
        except socket.gaierror as error:
            raise ResourceError(f"{place}: cannot be reached ({host}: {error.strerror}); check the name") from error
        except OSError as error:
            if time.monotonic() + 0.5 < deadline:
                time.sleep(0.5)
                continue
            raise ResourceError(
                f"{place}: cannot be reached ({host}:{port}: {error.strerror or error}); is its head running "
                "(`ray status` there), and is this its port?"
            ) from error
        else:
            return


def _mismatch(text: str) -> str:
    """Names the versions that differ. Ray lists the cluster's first."""
    found = {name: re.findall(rf"{name}: ([\w.+-]+)", text)[:2] for name in ("Ray", "Python")}
    told = [f"{name} {pair[0]} there and {pair[1]} here" for name, pair in found.items() if len(set(pair)) == 2]
    return "the cluster has other versions than this process" + (f" ({', '.join(told)})" if told else "")


def _whole_text(error: BaseException) -> str:
    return "\n".join(str(one) for one in _chain(error))


def _told(error: BaseException) -> str:
    return last_line(list(_chain(error))[-1])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _slow_imports() -> str:
    """Says what makes each import slow, if Ray's modules have no bytecode that this Python can read."""
    if Path(cache_from_source(ray.__file__)).exists():
        return ""
    optimised = "-O " * sys.flags.optimize
    return f" or without bytecode (once: {sys.executable} {optimised}-m compileall -q {Path(ray.__file__).parents[1]})"


def _folder() -> str:
    return os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
