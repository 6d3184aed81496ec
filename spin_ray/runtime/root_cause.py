"""Causes of vLLM's failures. Its other processes write them to the output, and its error only points there."""

import os
import re
import signal
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess

_POINTS_THERE = "root cause"
"""Words of such errors, of vLLM 0.29: in v1/engine/utils.py and v1/executor/multiproc_executor.py."""
_OUTPUT, _ERRORS = 1, 2
_LONGEST = 2**22
"""Most bytes that are read of a log."""
_CRASHES = ("Fatal Python error", "what()")
_ERROR = re.compile(
    r"^((?:\([^)]*\) )*)(?:ERROR [^\]]*\] )?\s*"
    r"((?:\w+\.)*(?!Cancelled)\w*(?:Error|Exception)(?:: .+)?|Fatal Python error: .+|what\(\): .+)$",
    re.MULTILINE,
)
"""Processes and text of a last line of a traceback, in vLLM's log or after it."""


@contextmanager
def root_cause_told() -> Iterator[None]:
    """Replaces an error of vLLM that only points to its other processes' output, if that is a file, as Ray's logs are.

    Raises:
        RuntimeError: the error of the process that failed first, or the signal that ended one.
    """
    begun = output_sizes()
    try:
        yield
    except Exception as error:
        if _POINTS_THERE not in str(error):
            raise
        if told := cause_since(begun) or _ended_by(str(error)):
            raise RuntimeError(f"vLLM: {told}") from error
        raise


def output_sizes() -> dict[int, int]:
    """Returns the bytes that stdout and stderr have by now, where they are files."""
    return {number: size for number in (_OUTPUT, _ERRORS) if (size := _size(number)) is not None}


def cause_since(begun: dict[int, int]) -> str:
    """Returns the cause that was written after the output had the sizes ``begun``; empty if none was."""
    return next(filter(None, (cause_in(_written(number, start)) for number, start in begun.items())), "")


def end_of(processes: Iterable[BaseProcess]) -> str:
    """Names the signal that ended one of vLLM's processes; empty if none did."""
    return _ended_by(str({process.name: process.exitcode for process in processes}))


def cause_in(output: str) -> str:
    """Returns the last error of the process that reported one first; empty if none did.

    Python's errors without a process are those of the main one, which did not fail, and count only if there is no
    other. A crash is written without its process. A name without text counts only if there is nothing else.
    """
    every = [(match[1], match[2]) for match in _ERROR.finditer(output) if _POINTS_THERE not in match[2]]
    others = [each for each in every if each[0] or each[1].startswith(_CRASHES)]
    found = [each for each in others if ": " in each[1]] or others or [each for each in every if ": " in each[1]]
    return next((text for process, text in reversed(found) if process == found[0][0]), "")


def _ended_by(error: str) -> str:
    """Names the signal in ``Failed core proc(s): {'EngineCore': -9}``."""
    if not (code := re.search(r"'(\w+)': -(\d+)", error)):
        return ""
    with suppress(ValueError):
        return f"{code[1]} was ended by signal {code[2]} ({signal.Signals(int(code[2])).name})"
    return ""


def _size(number: int) -> int | None:
    with suppress(OSError):
        found = os.fstat(number)
        return found.st_size if stat.S_ISREG(found.st_mode) else None
    return None


def _written(number: int, start: int) -> str:
    """Returns what was written to a file descriptor since it had ``start`` bytes."""
    with suppress(OSError), open(f"/dev/fd/{number}", "rb") as log:
        log.seek(max(start, (_size(number) or 0) - _LONGEST))
        return log.read().decode(errors="replace")
    return ""
