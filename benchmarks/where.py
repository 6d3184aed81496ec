"""Commit and machine of a measurement. Imports nothing that a GPU's machine may lack."""

import os
import platform
import subprocess
from pathlib import Path


def commit() -> str:
    """Returns the commit of this copy, ``unknown`` without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        asked = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def machine() -> str:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return f"{os.cpu_count()} × {model.partition(':')[2].strip() or platform.machine()}"
