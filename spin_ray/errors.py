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


class StageError(RuntimeError):
    """A stage failed in a way that the same command, run again, may get past."""


def first_line(error: BaseException) -> str:
    """What another library's error says in its first line; its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """The last line that says something: in Ray's errors, what happened in the actor or worker."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
