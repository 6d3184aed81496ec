"""Errors that the user can repair (one line, exit code 2), and failures of a run (exit code 1)."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """Bad input; the message names thing, reason and remedy in one line."""


class ConfigError(UserError):
    """A recipe that cannot work."""


class DataError(UserError):
    """Data that cannot be used."""


class ModelError(UserError):
    """A model folder that cannot be used or trusted."""


class ResourceError(UserError):
    """A request that the cluster cannot meet."""


class RunDirError(UserError):
    """A run folder that is another run's, in use, or damaged."""


def was_and_now(differing: Mapping[str, tuple[object, object]]) -> list[str]:
    """Returns ``optimizer.eps (was 1e-08, now 0.001)`` for each old and new value; None: not set."""
    return [f"{key} (was {was!r}, now {now!r})" for key, (was, now) in differing.items()]


class OtherRunError(RunDirError):
    """A run folder that was begun with other settings or inputs."""

    def __init__(self, root: object, differing: dict[str, tuple[object, object]]) -> None:
        """Takes old and new value of each differing setting or input; None: not set."""
        self.root, self.differing = root, differing
        each = "; ".join(was_and_now(differing))
        super().__init__(f"{root}: holds another run: {each}; restore these or choose another --out")


class NotCommittedError(RunDirError):
    """An artefact of the run that nothing has committed yet."""

    def __init__(self, message: str, path: str = "") -> None:
        """Takes the artefact's folder, relative to the run, as ``path``."""
        self.path = path
        super().__init__(message)


class HealthError(UserError):
    """Training that is destroying the model."""


class StageError(RuntimeError):
    """A failure that a second run may get past."""


class TransientError(StageError):
    """A failure that another attempt may not meet, such as a file that did not arrive from another machine."""


@contextmanager
def writing(place: object) -> Iterator[None]:
    """Raises ConfigError if the file or folder ``place``, which the user named, cannot be made or written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{place}: cannot be written ({error})") from error


LONGEST_LINE = 400


def first_line(error: BaseException) -> str:
    """Returns the error's first line with text, or its type if there is none; of Ray's errors ``last_line``."""
    if _is_of_ray(error):
        return last_line(error)
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """Returns the line that says what happened, shortened to ``LONGEST_LINE`` characters.

    That is the message of the last exception in a traceback, the last line of Ray's own errors, else the first line.
    """
    last = _last_line(error)
    return last if len(last) <= LONGEST_LINE else f"{last[:LONGEST_LINE]} …"


def _last_line(error: BaseException) -> str:
    """Skips Ray's and pydantic's advice and Ray Data's trailer, whose cause is the last exception before it.

    Messages of CUDA and of compilers end in advice, too.
    """
    text = str(error)
    before, trailer, _ = text.rpartition("UserCodeException")
    if trailer:
        text = before.rpartition("The above exception was the direct cause")[0] or text
    if killed := _KILLED_FOR_MEMORY.search(text):
        return killed[0].replace(killed[1] or "", "")
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("Refer to the doc")]
    if not lines:
        return type(error).__name__
    if len(lines) > 2 and lines[-1].strip().startswith(_PYDANTICS_ADVICE):
        return ": ".join(line.strip() for line in lines[-3:-1])  # the field and what is wrong with it
    start = _after_traceback(lines)
    said = lines[start or 0 :]
    if len(said) == 1 or said[0].startswith("ray.exceptions.") or (start is None and _is_of_ray(error)):
        return _ended(text) if _ENDED_SAYS_RAY.search(said[-1]) else said[-1]
    return f"{said[0]} {said[1].strip()}" if said[0].rstrip().endswith(":") else said[0]


_KILLED_FOR_MEMORY = re.compile(r".*killed due to the node running low on memory\.(?:.*?(, ID: \w+).*? limit)?")
"""What Ray 2.60 says of a process that its memory monitor killed, before tables of workers and processes."""
_ENDED_SAYS_RAY = re.compile(r"exits with a connection error code 2|^The worker died unexpectedly")
"""What Ray 2.60 says of a process that was killed by a signal, before a list of possible causes."""


def _ended(text: str) -> str:
    pid, node = re.search(r"^\s*pid: (\d+)", text, re.MULTILINE), re.search(r"^\s*ip: (\S+)", text, re.MULTILINE)
    return f"a process{f' (pid {pid[1]} on {node[1]})' if pid and node else ''} was killed by the system or crashed"


def _is_of_ray(error: BaseException) -> bool:
    return type(error).__module__.startswith("ray.")


def _after_traceback(lines: list[str]) -> int | None:
    """Returns the index of the line after the last traceback; None if there is no traceback."""
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    after = range(frames[-1] + 1, len(lines)) if frames else ()
    return next((number for number in after if not lines[number].startswith(" ")), None)


_PYDANTICS_ADVICE = "For further information visit https://errors.pydantic.dev"


def user_error_in(error: BaseException) -> UserError | None:
    """Returns the UserError of another process: the cause of Ray's error, or read from its text, all of Ray Data's."""
    if isinstance(cause := getattr(error, "cause", None), UserError):
        return cause
    named = re.fullmatch(rf"{__name__}\.(\w+): (.*)", _last_line(error))
    kind = globals().get(named[1]) if named else None
    if named is None or not isinstance(kind, type) or not issubclass(kind, UserError):
        return None
    return (UserError if kind is OtherRunError else kind)(named[2])


def is_of_dead_process(error: BaseException) -> bool:
    """Tells whether Ray says of an error only that a process has died."""
    return bool(_ENDED_SAYS_RAY.search(str(error)))


def memory_advice(error: BaseException | str, remedies: str) -> str:
    """Returns a clause with ``remedies`` if memory ran out, else an empty string.

    Ray's and CUDA's errors mention memory; of a process that the kernel kills, Ray knows only that it ended.
    """
    text = str(error).lower()
    if any(words in text for words in ("out of memory", "outofmemory", "running low on memory", "(oom)")):
        return f"; memory ran out: {remedies}"
    if "sigkill" in text or (isinstance(error, BaseException) and is_of_dead_process(error)):
        return f"; if memory ran out, {remedies}"
    return ""
