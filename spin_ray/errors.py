"""The two kinds of errors: those that the user can mend, and failures of a run.

The command line prints a ``UserError`` as one line and exits with code 2. Every other error ends it with code 1.
"""


class UserError(Exception):
    """Bad input. The message names the thing (file, row or field), the reason and the remedy in one line."""


class ConfigError(UserError):
    """A recipe, or a combination of its values, that cannot work."""


class DataError(UserError):
    """Training or held-out data that cannot be used."""


class ModelError(UserError):
    """A model folder that cannot be used or must not be trusted."""


class ResourceError(UserError):
    """A request of a stage that the cluster cannot meet."""


class RunDirError(UserError):
    """A run folder that belongs to another run, is in use, or is damaged."""


class HealthError(UserError):
    """Training that is destroying the model, so that more of it would not help."""


class StageError(RuntimeError):
    """A failure of a stage that the same command, run again, may get past."""


LONGEST_LINE = 400
"""Most characters of another library's error that are passed on."""


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error, or its type if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """Returns the last informative line of an error, which in Ray's errors tells what happened in the actor or worker.

    Skips Ray's advice and Ray Data's trailer below the error of a function that it called.
    """
    text = str(error)
    if "UserCodeException" in text:
        text = text.partition("The above exception was the direct cause")[0]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("Refer to the doc")]
    last = lines[-1] if lines else type(error).__name__
    return last if len(last) <= LONGEST_LINE else f"{last[:LONGEST_LINE]} …"


def memory_advice(error: BaseException, remedies: str) -> str:
    """Returns a clause with the remedies, to end a message with, if memory ran out; else an empty string.

    Ray names memory when it kills a process because its node is nearly full. The kernel sends SIGKILL without a word.
    """
    text = str(error).lower()
    if any(words in text for words in ("out of memory", "outofmemory", "running low on memory", "(oom)")):
        return f"; memory ran out: {remedies}"
    if "sigkill" in text or "signal 9" in text or "exit code -9" in text:
        return f"; killed by the system, most likely as memory ran out: {remedies}"
    return ""
