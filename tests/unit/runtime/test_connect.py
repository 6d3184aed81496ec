"""A Ray that cannot start here is one line with a remedy, not a traceback of Ray's."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from spin_ray.errors import ResourceError
from spin_ray.runtime.connect import connect
from tests.support.fakes import config_of
from tests.support.paths import ROOT


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

    def start(error: Exception, **cluster: Any) -> None:
        def refuse(**_: Any) -> None:
            raise error

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", refuse)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        connect(config_of(cluster=cluster))

    return start


def test_a_start_that_takes_too_long_is_one_line_with_the_remedy(start):
    """Ray raises a plain Exception."""
    with pytest.raises(ResourceError, match=r"took longer than the 30 s .*; run the command again when the"):
        start(Exception("The current node timed out during startup. This could happen because some of the raylet …"))


def test_an_address_that_nobody_answers_is_named(start):
    with pytest.raises(ResourceError, match=r"cluster\.address 10\.0\.0\.9:6379: cannot be reached \(no one there\)"):
        start(ConnectionError("no one there"), address="10.0.0.9:6379")


def test_what_nobody_foresaw_keeps_its_traceback(start):
    with pytest.raises(OSError, match="No space left"):
        start(OSError("No space left on device"))
