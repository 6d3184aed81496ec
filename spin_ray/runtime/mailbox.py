"""Warnings of other processes for the driver, which does not hear their logs (``log_to_driver=False``).

The texts lie in Ray's key-value store, which outlives train workers and their controller.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mailbox:
    """A place for texts that every process of the cluster can write to."""

    name: str

    def put(self, text: str) -> None:
        _internal_kv_put(f"{self.name}/text/{time.time_ns():020d}-{os.getpid()}", text)

    def take(self) -> list[str]:
        """Returns and removes the texts, in the order of their times."""
        texts = []
        for key in sorted(_internal_kv_list(f"{self.name}/text/")):
            texts.append(_internal_kv_get(key).decode())
            _internal_kv_del(key)
        return texts

    def put_failure(self, text: str, cause: str) -> None:
        """Puts a text of a failure and keeps the first failure's cause."""
        with suppress(Exception):  # a failed report never fails the work
            _internal_kv_put(f"{self.name}/failure", cause, overwrite=False)
            self.put(text)

    def first_failure(self) -> str:
        """Returns the first failure's cause; empty if there was no failure."""
        return (_internal_kv_get(f"{self.name}/failure") or b"").decode()

    def remove(self) -> None:
        _internal_kv_del(f"{self.name}/", del_by_prefix=True)


@contextmanager
def passed_on(warn: Callable[[str], Any]) -> Iterator[tuple[Mailbox, Callable[[], None]]]:
    """Yields a mailbox and a function that hands its new texts to ``warn``, each text once.

    The last ones are handed on at the end.
    """
    mailbox, told = Mailbox(f"spin-ray-mailbox-{uuid.uuid4().hex}"), set()

    def read() -> None:
        texts: list[str] = []
        with suppress(Exception):  # Ray itself may be gone
            texts = mailbox.take()
        for text in texts:
            if text not in told:
                told.add(text)
                try:
                    warn(text)
                except Exception:  # such as a storage's: a failed report never fails the work
                    logger.exception("a warning could not be kept: %s", text)

    try:
        yield mailbox, read
    except BaseException:
        with suppress(Exception):  # a failing log must not hide the error
            read()
        raise
    else:
        read()
    finally:
        with suppress(Exception):
            mailbox.remove()


@contextmanager
def warnings_into(mailbox: Mailbox) -> Iterator[None]:
    """Puts the texts that this package logs as warnings or errors into ``mailbox``, each text once."""
    logger, handler = logging.getLogger(__name__.partition(".")[0]), _IntoMailbox(mailbox)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _IntoMailbox(logging.Handler):
    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__(logging.WARNING)
        self._mailbox = mailbox
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if text not in self._told:
                self._told.add(text)
                self._mailbox.put(text)
        except Exception:  # a failed report never fails the work
            self.handleError(record)
