"""A Ray that cannot start here is one line with a remedy, not a traceback of Ray's."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import services

from spin_ray.errors import ConfigError, ResourceError, StageError
from spin_ray.runtime import connect as connect_module
from spin_ray.runtime import start_errors
from spin_ray.runtime.connect import connect, refuse_other_ray
from spin_ray.runtime.gpu import runs_elsewhere
from tests.support.fakes import config_of
from tests.support.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_whose_path_is_too_long_for_sockets_is_named_with_the_remedy(tmp_path: Path, variable: str):
    """For real, in a process of its own: sockets of Unix have at most 107 bytes."""
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    program = (
        "from spin_ray.config.recipe import SpinConfig\n"
        "from spin_ray.errors import ResourceError\n"
        "from spin_ray.runtime.connect import connect\n"
        "try:\n"
        "    connect(SpinConfig(model={'path': 'm'}, data={'train': 'd'}))\n"
        "except ResourceError as error:\n"
        "    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_TMPDIR", "RAY_ADDRESS")}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment | {variable: str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert told.stdout.strip() == (
        f"Ray did not start on this machine: its sockets lie in {folder}, whose path is too long for them; "
        "set TMPDIR or RAY_TMPDIR to a short path, e.g. RAY_TMPDIR=/tmp"
    ), told.stderr


@pytest.fixture
def start(monkeypatch):
    """Calls ``connect`` where Ray's start ends in an error."""

    def start(error: Exception, environment: str | None = None, **cluster: Any) -> None:
        def refuse(**_: Any) -> None:
            raise error

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", refuse)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        if environment:
            monkeypatch.setenv("RAY_ADDRESS", environment)
        connect(config_of(cluster=cluster))

    return start


def test_a_start_that_takes_too_long_is_one_line_with_the_remedy(start):
    """Ray raises a plain Exception."""
    with pytest.raises(ResourceError, match=r"took longer than the 30 s .*; run the command again when the"):
        start(Exception("The current node timed out during startup. This could happen because some of the raylet …"))


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (ValueError("The configured object store size (12.0 GB) exceeds /dev/shm size (0.06 GB). This"), "--shm-size"),
        (
            ValueError("Attempting to cap object store memory usage at 6e7 bytes, but the minimum allowed is"),
            "/dev/shm",
        ),
        (OSError(28, "No space left on device"), r"the disk of .* is full"),
        (PermissionError(13, "Permission denied: '/tmp/ray/session_1'"), "RAY_TMPDIR to a folder of your own"),
        (PermissionError(13, "Permission denied", "/.ray"), "set RAY_AUTH_TOKEN to a secret, or HOME"),
        (RuntimeError("Failed to start GCS.\nThe last lines:\n... Address already in use"), "`ray stop` ends"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
    ],
)
def test_a_machine_that_lacks_what_ray_needs_is_one_line_with_the_cure(start, words, cure):
    with pytest.raises(ResourceError, match=f"^Ray did not start on this machine: .*{cure}") as caught:
        start(words)
    assert "\n" not in str(caught.value)


def test_a_slow_start_without_bytecode_says_how_to_make_it(start, monkeypatch, tmp_path):
    monkeypatch.setattr(start_errors, "cache_from_source", lambda _: tmp_path / "no.pyc")
    with pytest.raises(
        ResourceError, match=r"or without bytecode \(once: .*python\S* -m compileall -q .*packages\); run"
    ):
        start(Exception("The current node timed out during startup."))


def test_what_nobody_foresaw_is_one_line_that_names_ray_s_logs(start):
    """The reason is the first error of the chain; its traceback stays in ``__cause__``."""
    error = RuntimeError("Ray is not there.\nRefer to the docs")
    error.__cause__ = KeyError("plasma")
    with pytest.raises(
        StageError, match=r"did not start on this machine: 'plasma'; its logs are in .*/ray/session_"
    ) as e:
        start(error)
    assert e.value.__cause__ is error


def test_a_machine_without_its_loopback_interface_is_named_before_ray_hangs(start, monkeypatch) -> None:
    """A connection ends in what ``ip link set lo down`` makes of it."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(ResourceError, match=r"127\.0\.0\.1 cannot be reached \(Network is unr.*ip link set lo up"):
        start(AssertionError("Ray was asked"))


# A cluster that cannot be joined


@pytest.fixture
def port() -> Iterator[str]:
    """An address that accepts connections, and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_that_ray_cannot_use_is_named_with_the_innermost_reason(start, port, monkeypatch):
    monkeypatch.setattr(services, "resolve_ip_for_localhost", lambda host: host)
    error = ConnectionError(f"Failed to connect to Ray cluster at {port}")
    error.__cause__ = RuntimeError("no one there")
    with pytest.raises(ResourceError, match=rf"^cluster\.address {port}: cannot be reached \(no one there\)"):
        start(error, address=port)


def test_another_version_of_ray_or_python_is_told_by_its_numbers(start, port, monkeypatch):
    monkeypatch.setattr(services, "resolve_ip_for_localhost", lambda host: host)
    words = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.12.3\n"
        "This process on 10.0.0.1 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )
    with pytest.raises(
        ResourceError, match=r"other versions than this process \(Python 3\.12\.3 there and 3\.11\.7 here"
    ):
        start(RuntimeError(words), address=port)


def test_a_dead_address_is_told_in_seconds_and_by_the_name_that_it_has(start, monkeypatch):
    """Port 9 refuses at once; Ray alone would try for 41 s. The address comes from the environment here."""
    monkeypatch.setattr(start_errors, "ANSWER_S", 0.2)
    monkeypatch.setattr(services, "resolve_ip_for_localhost", lambda host: host)
    begun = time.monotonic()
    with pytest.raises(ResourceError, match=r"^cluster\.address 127\.0\.0\.1:9: .*Connection refused.*ray status"):
        start(AssertionError("Ray was asked"), address="127.0.0.1:9")
    with pytest.raises(ResourceError, match=r"^RAY_ADDRESS 127\.0\.0\.1:9: .*Connection refused"):
        start(AssertionError("Ray was asked"), environment="127.0.0.1:9")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(("address", "words"), [("head", "is no address"), ("no.such.invalid:6379", "check the name")])
def test_a_slip_in_an_address_is_told_at_once(start, address, words):
    with pytest.raises(ResourceError, match=rf"^cluster\.address {address}: .*{words}"):
        start(AssertionError("Ray was asked"), address=address)


@pytest.mark.parametrize("changed", [True, False])
def test_other_source_in_the_current_folder_is_refused(start, tmp_path, monkeypatch, changed):
    """Ray's workers look there first; an installed command does not, and would go on with two versions."""
    copy = tmp_path / "spin_ray"
    shutil.copytree(ROOT / "spin_ray", copy, ignore=shutil.ignore_patterns("__pycache__"))
    if changed:
        (copy / "errors.py").write_text("")
    monkeypatch.chdir(tmp_path)
    kind, words = (ConfigError, f"^{copy}: is other source than") if changed else (StageError, "Ray was asked")
    with pytest.raises(kind, match=words):
        start(AssertionError("Ray was asked"))


# A process that is connected already


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Connects this process, so it seems, to a Ray of 8 CPUs on port 6379 of this machine."""

    def connected(*, embedded: bool) -> None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:6379"))
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
        monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
        monkeypatch.setattr(connect_module, "is_embedded", lambda: embedded)
        monkeypatch.setattr(services, "get_node_ip_address", lambda: "10.0.0.5")

    return connected


@pytest.mark.parametrize(
    ("embedded", "cluster", "told"),
    [
        (True, {"address": "auto"}, "cluster.address auto: this process is connected to a Ray of its own at 127.0.0.1"),
        (True, {"address": "10.0.0.9:6379"}, "cluster.address 10.0.0.9:6379: .* a Ray of its own at 127.0.0.1:6379"),
        (
            False,
            {"address": "10.0.0.9:6379"},
            "cluster.address 10.0.0.9:6379: .* connected to the cluster at 127.0.0.1",
        ),
        (False, {"address": "127.0.0.1:6380"}, "cluster.address 127.0.0.1:6380: .* connected to the cluster"),
        (True, {"local_cpus": 4}, "cluster.local_cpus: 4 are for a new Ray, .* connected to one with 8 at 127.0.0.1"),
        (False, {"local_cpus": 4}, "cluster.local_cpus: 4 are for a new Ray, .* connected to one with 8"),
        (True, {"local_cpus": 8}, None),
        (True, {}, None),
        (False, {}, None),
        (False, {"address": "auto"}, None),
        (False, {"address": "auto", "local_cpus": 4}, None),
        (False, {"address": "localhost:6379"}, None),
        (False, {"address": "10.0.0.5:6379"}, None),
        (False, {"address": "ray://head:10001"}, None),
        (True, {"address": "local"}, None),
        (False, {"address": "local"}, "cluster.address local: this process is connected to the cluster at 127.0.0.1"),
    ],
)
def test_another_ray_than_the_one_of_this_process_is_refused_with_the_cure(connected, embedded, cluster, told) -> None:
    """A second run of a notebook took the first one's Ray, whatever its recipe asked for."""
    connected(embedded=embedded)
    config = config_of(cluster=cluster)
    assert runs_elsewhere(config) == (not embedded), "what a run stays on decides what this machine is asked for"
    if told is None:
        connect(config)
        return
    with pytest.raises(ConfigError, match=rf"^{told}.*call ray\.shutdown\(\) first, or (leave|give) .* to stay there$"):
        refuse_other_ray(config)


def test_an_address_of_the_environment_is_compared_too(connected, monkeypatch) -> None:
    connected(embedded=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    with pytest.raises(
        ConfigError, match=r"^RAY_ADDRESS 10\.0\.0\.9:6379: this process is connected to the cluster at"
    ):
        refuse_other_ray(config_of())


@pytest.fixture
def options_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns what ``connect`` gives an embedded Ray at its start."""

    class Started(Exception):
        pass

    def options_of(**config: Any) -> dict[str, Any]:
        given: dict[str, Any] = {}

        def init(**options: Any) -> None:
            given.update(options)
            raise Started

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with pytest.raises(StageError):
            connect(config_of(**config))
        return given

    return options_of


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_ray_that_serves_on_gpus_has_no_hook_beside_that_of_ray_llm(options_of: Any, gpus: int) -> None:
    """ray.llm's engine on GPUs joins Ray with a hook of its own, and Ray refuses two."""
    assert ("runtime_env" in options_of(serving={"resources": {"gpus": gpus}})) == (not gpus)


def test_an_embedded_ray_has_the_cpus_and_the_memory_of_this_process(options_of: Any, monkeypatch) -> None:
    """Ray itself sees neither ``taskset`` nor the limit of a nested cgroup, as Slurm and systemd-run make them."""
    monkeypatch.setattr(connect_module, "usable_cpus", lambda: 3)
    monkeypatch.setattr(connect_module, "memory_limit", lambda: 10 * 2**30)
    monkeypatch.setattr(connect_module, "get_system_memory", lambda: 64 * 2**30)
    given = options_of()
    assert given["num_cpus"] == 3 and given["_memory"] + given["object_store_memory"] == 10 * 2**30
    assert given["object_store_memory"] <= 3 * 2**30
    assert options_of(cluster={"local_cpus": 8})["num_cpus"] == 8
    monkeypatch.setattr(connect_module, "get_system_memory", lambda: 10 * 2**30)
    assert "_memory" not in options_of(), "Ray sees this limit itself"
