"""Ray's C++ log lines go to a file that is named; everything else reaches the terminal, also of a process that dies."""

import os
import subprocess
import sys

import pytest

from spin_ray.runtime import stderr_sorter

RAY = (
    "[2026-11-27 09:49:18,333 E 9583 9583] core_worker.cc:2254: Actor with class name: 'MapWorker' has constructor "
    "arguments in the object store and max_restarts > 0."
)
WRITE = f"""
import os, sys
from spin_ray.runtime.stderr_sorter import sort_stderr
sort_stderr()
print("a line of ours", file=sys.stderr)
os.write(2, {RAY!r}.encode()[:30])
os.write(2, {RAY!r}.encode()[30:] + b"\\n[1/2] ours, too\\nhalf ")
os.write(2, b"a line\\n[2026-11-27 09:49:18,333 C 9583 9583] core_worker.cc:1: fatal")
"""


@pytest.mark.parametrize("end", ["", "os.abort()", "os.kill(os.getpid(), 9)"])
def test_only_ray_s_lines_go_to_the_file(tmp_path, end):
    process = subprocess.run(
        [sys.executable, "-c", WRITE + end],
        env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    (log,) = tmp_path.iterdir()
    assert log.read_text() == RAY + "\n"
    assert process.stdout == "" and process.stderr.splitlines() == [
        "a line of ours",
        f"messages of Ray's core are in {log}",
        "[1/2] ours, too",
        "half a line",
        "[2026-11-27 09:49:18,333 C 9583 9583] core_worker.cc:1: fatal",
    ]


def test_python_s_own_stderr_stays_the_terminal():
    """A live view and colours are for terminals; handlers of logs go along."""
    said = (
        "import logging, sys; logging.basicConfig(stream=sys.stderr, level=20, format='%(message)s')\n"
        "from spin_ray.runtime.stderr_sorter import sort_stderr\n"
        "before = sys.stderr.isatty(); sort_stderr(); logging.info(f'log {before} {sys.stderr.isatty()}')"
    )
    main, terminal = os.openpty()
    subprocess.run([sys.executable, "-c", said], stderr=terminal, timeout=60, check=True)
    os.close(terminal)
    assert os.read(main, 1000).splitlines() == [b"log True True"]
    os.close(main)


def test_a_notebook_s_stderr_is_left_alone(monkeypatch, capsys):
    """capsys stands for it: it has no file descriptor 2."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    stderr_sorter.sort_stderr()
