"""A run folder that another user made with umask 077 is an error of one line for every command."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spin_ray.errors import RunDirError
from spin_ray.loop import launch
from spin_ray.report.export import export
from spin_ray.report.page.write import report_page
from spin_ray.report.status import status_as_json
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.serving.iterates import check_models

NOBODY = 65534


@pytest.fixture
def theirs(calm: Path) -> Iterator[Path]:
    """A copy of a run in a folder that everybody may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(calm, run := Path(folder) / "run")
        yield run


@contextmanager
def kept_from_us(path: Path) -> Iterator[None]:
    """Takes ``path`` from this user: root becomes another one, others lose their own rights."""
    is_root, mode = os.geteuid() == 0, path.stat().st_mode
    path.chmod(mode & 0o700 if is_root else 0)
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        path.chmod(mode)


COMMANDS: dict[str, Callable[[RunDir, Any], object]] = {
    "status": lambda run, _: status_as_json(run),
    "report": lambda run, _: report_page([run]),
    "export": lambda run, _: export(run, "latest", "/tmp/nowhere"),
    "serve": lambda run, _: check_models(run, ("latest",)),
    "run": lambda run, config: launch.run_spin(config, run.storage.root),
}


READ = {
    "status": ["", "run.json", "LATEST", "iter_000"],
    "report": ["", "run.json", "LATEST", "iter_000"],
    "export": ["", "run.json", "LATEST", "iter_000"],
    "serve": ["", "LATEST"],
    "run": ["", "iter_000"],
}
"""Paths in a run that a command reads before it would change anything."""


@pytest.mark.parametrize(("command", "name"), [(command, name) for command, names in READ.items() for name in names])
def test_what_cannot_be_read_is_named_in_one_line(config, theirs, command, name):
    run = RunDir(Storage(theirs))
    with kept_from_us(theirs / name), pytest.raises(RunDirError, match=r"(read|run) \(Permission denied\)") as caught:
        COMMANDS[command](run, config)
    assert "\n" not in str(caught.value)


def test_a_lease_that_cannot_be_read_is_named(config, theirs):
    (theirs / "lease.json").write_text("{}")
    with kept_from_us(theirs / "lease.json"), pytest.raises(RunDirError, match=r"lease.json: cannot be read \(Perm"):
        launch.run_spin(config, theirs)
