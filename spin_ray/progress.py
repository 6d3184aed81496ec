"""Live progress: a bar with rates and ETA on a terminal, a plain line now and then elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

LINE_EVERY_S = 60


class StageProgress:
    """Progress of one stage, counted in ``unit`` (rows or steps)."""

    def __init__(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._done, self._done_before, self._tokens = done, done, 0
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description:28}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task(stage, total=total, completed=done, rate="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        if not error and self._done > self._done_before:
            logger.info("%s", self._line())

    def advance(self, done: int, tokens: int) -> None:
        """``done`` more units and ``tokens`` more tokens."""
        self._done += done
        self._tokens += tokens
        if self._bar:
            self._bar.update(self._task, completed=self._done, rate=self._rate())
        elif time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            logger.info("%s", self._line())

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        return f"{(self._done - self._done_before) / seconds:.2f} {self._unit}/s, {self._tokens / seconds:.0f} tokens/s"

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        left = (self._total - self._done) * seconds / max(self._done - self._done_before, 1)
        eta = f", {left:.0f} s left" if self._done < self._total else f" in {seconds:.0f} s"
        return f"{self._stage}: {self._done}/{self._total} {self._unit}, {self._rate()}{eta}"
