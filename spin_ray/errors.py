"""Errors written for the person who reads them.

A ``UserError`` is something the user can mend: the command line prints its one line and exits with code 2.
Anything else is a failure of the run (exit code 1).
"""


class UserError(Exception):
    """Bad input; the message names the thing (file, row or field), the reason and the remedy in one line."""


class ConfigError(UserError):
    """The recipe, or a combination of its values, cannot work."""


class DataError(UserError):
    """The training or held-out data cannot be used."""


class ModelError(UserError):
    """The model folder cannot be used, or must not be trusted."""


class ResourceError(UserError):
    """The cluster cannot satisfy what a stage asks for."""


class RunDirError(UserError):
    """The run directory belongs to another run, is in use, or is damaged."""


class HealthError(UserError):
    """The model is being destroyed by its training; more of the same would not help."""


class StageError(RuntimeError):
    """A stage failed in a way that the same command, run again, may get past."""


LONGEST_LINE = 400
"""Characters of another library's error that are passed on."""


def first_line(error: BaseException) -> str:
    """What another library's error says in its first line; its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """The last line that says something: in Ray's errors, what happened in the actor or worker; not Ray's own advice,
    a page of it on one line, nor what Ray Data says below the error of a function that it called.
    """
    text = str(error)
    if "UserCodeException" in text:
        text = text.partition("The above exception was the direct cause")[0]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Refer to the doc")]
    last = lines[-1] if lines else type(error).__name__
    return last if len(last) <= LONGEST_LINE else f"{last[:LONGEST_LINE]} …"


def memory_advice(error: BaseException, remedies: str) -> str:
    """``; <remedies>`` if memory ran out, else nothing.

    Ray kills a process when its node is nearly full, and says so; the kernel sends SIGKILL and says nothing.
    """
    text = str(error).lower()
    if any(words in text for words in ("out of memory", "outofmemory", "running low on memory", "(oom)")):
        return f"; memory ran out: {remedies}"
    if "sigkill" in text or "signal 9" in text or "exit code -9" in text:
        return f"; killed by the system, most likely as memory ran out: {remedies}"
    return ""
