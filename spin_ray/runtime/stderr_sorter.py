"""Keeps Ray's C++ log lines off the terminal, where Ray writes them whatever its settings (ray-project/ray#12893).

A separate process reads the driver's file descriptor 2, so that nothing is lost if the driver dies. Ray's lines go to a
log file, whose name is shown once, and all others to the terminal. ``sys.stderr`` stays the terminal.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

RAY_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [EW] \d+ \d+\] (\(\S+\) )?\S+\.cc:\d+: ")
"""Beginning of a warning or error of Ray's core. Fatal ones (C) end the process and stay on the terminal."""


def sort_stderr() -> None:
    """Starts the sorter for this process, unless ``sys.stderr`` is not file descriptor 2."""
    try:
        if sys.stderr.fileno() != 2:
            return
    except (AttributeError, OSError, ValueError):  # a notebook's, or a test's
        return
    file, log = tempfile.mkstemp(prefix="spin-ray-", suffix=".log")
    os.close(file)
    reader, writer = os.pipe()
    # In a session of its own: Ctrl-C and signals of a batch system are meant for the driver.
    subprocess.Popen([sys.executable, "-I", "-S", __file__, log], stdin=reader, start_new_session=True)
    _keep_python_s_own()
    os.dup2(writer, 2)
    os.close(writer)
    os.close(reader)


def _keep_python_s_own() -> None:
    before = sys.stderr
    before.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(sys.stderr)


def sort(log: str) -> None:
    """Reads file descriptor 0 to its end; shows a line that cannot be Ray's before it is complete."""
    pending, begun = b"", False
    while chunk := os.read(0, 2**16):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            if begun or not RAY_LINE.match(line):
                _write(line + b"\n")
            else:
                _keep(line, log)
            begun = False
        if pending and (begun or not pending.startswith(b"[")):
            _write(pending)
            pending, begun = b"", True
    _write(pending)
    with suppress(OSError):
        if os.path.getsize(log) == 0:
            os.unlink(log)


def _write(text: bytes) -> None:
    while text:
        text = text[os.write(2, text) :]


def _keep(line: bytes, log: str) -> None:
    try:
        with open(log, "ab") as file:
            is_first = file.tell() == 0
            file.write(line + b"\n")
    except OSError:  # a full disk
        _write(line + b"\n")
        return
    if is_first:
        _write(f"messages of Ray's core are in {log}\n".encode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sort(sys.argv[1])
