"""Votes, and one real server for the folder: Ray Serve and vLLM in processes of their own, as a user starts them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spin_ray.serving.arena.votes import VoteStore
from tests.support.program import ROOT
from tests.support.ray_head import free_port
from tests.support.served import Served, serving
from tests.support.tiny_runs import make_run


@pytest.fixture
def votes(tmp_path: Path) -> Iterator[VoteStore]:
    store = VoteStore(f"sqlite:///{tmp_path}/votes.sqlite")
    yield store
    store.close()


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serves ``sft`` and ``latest`` (iter-0 at first) of a tiny run in place of the demonstration."""
    folder = tmp_path_factory.mktemp("served")
    run = make_run(folder / "demo", iterates=1)
    port = free_port()
    make = ["make", "-n", "-o", ".venv/.ready", "serve-demo", f"RUN={folder}", f"PORT={port}"]
    # The tests themselves may run under make, which would say so in this one's output.
    without_make = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    recipe = subprocess.run(make, cwd=ROOT, env=without_make, capture_output=True, text=True, check=True).stdout
    program, *arguments = recipe.split()
    assert program.endswith("/spin-ray")
    command = [sys.executable, "-m", "spin_ray", *arguments]
    options = ["--serving.max_concurrent=8", "--serving.max_tokens=200", "--serving.body_timeout_s=5"]
    serves = {"latest": "iter-0", "sft": "sft"}
    with serving(run, port, [*command, *options], folder / "log", serves) as served:
        yield served
