"""Finds out, once per boot, what this machine can do."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from spin_ray.run_dir.boot import boot_id


def in_own_process(program: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a Python program that may die, and that must keep no memory or GPU."""
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def once_per_boot(name: str, find: Callable[[], str]) -> str:
    """Returns the first result of ``find`` since boot."""
    memo = Path(tempfile.gettempdir()) / f"spin-ray-{os.getuid()}-{name}-{boot_id()}"
    try:
        return memo.read_text()
    except FileNotFoundError:
        found = find()
        part = memo.with_name(f"{memo.name}.{os.getpid()}")
        part.write_text(found)
        part.replace(memo)  # no other process reads half of it
        return found
