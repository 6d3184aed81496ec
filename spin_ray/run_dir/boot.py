"""The boot of this machine, whose id changes when it starts anew."""

import socket
from pathlib import Path

import psutil


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{socket.gethostname()}-{psutil.boot_time():.0f}"
