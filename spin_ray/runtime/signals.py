"""Signals that end a process in peace."""

import signal
import sys


def ending_signals() -> list[int]:
    """Returns SIGTERM, and SIGHUP, which ends what a closed terminal started, unless ``nohup`` has it ignored."""
    hangup = getattr(signal, "SIGHUP", None)
    is_meant = hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN
    return [signal.SIGTERM, *([hangup] if is_meant else [])]


def exit_as_terminated(*_: object) -> None:
    """Ends the process by an exception, which releases the lease, so that another machine can go on at once."""
    sys.exit(signal.SIGTERM)
