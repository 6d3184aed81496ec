"""Progress of a run: a live view on a terminal, a line a minute in a log, and ``RUN/progress.json``."""

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import RunDirError, StageError, first_line
from spin_ray.report.forecast import PREPARATION, Forecast, Play, forecast
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.events import Span, close_lost_attempt, duration, of_driver, spans
from spin_ray.run_dir.names import iterate_name, iteration_name
from spin_ray.run_dir.run_dir import RunDir

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
LINE_EVERY_S = 60
STATE_AFTER_S, STATE_EVERY_S = 10, 15
"""Seconds before ``progress.json`` is first written, and between later times."""


class StageProgress:
    """Progress of one stage, counted in ``unit``."""

    current: "StageProgress | None" = None
    """Stage that this process runs."""

    def __init__(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, done
        self._done_before, self._tokens, self._started = done, 0.0, time.monotonic()
        self._measured_s: float | None = None

    def __enter__(self) -> Self:
        StageProgress.current = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        StageProgress.current = None
        if not kind and self.done > self._done_before:
            logger.info("%s: %s in %s", self.stage, self.rates(), duration(self._seconds))

    def advance(self, done: int, tokens: int) -> None:
        self.done += done
        self._tokens += tokens

    def restate(self, done: int, before: int, tokens: float, seconds: float) -> None:
        """Sets all counts. Work after the first ``before`` units took ``seconds``, whenever it is seen."""
        self.done, self._done_before, self._tokens, self._measured_s = done, before, tokens, seconds

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - self._started if self._measured_s is None else self._measured_s, 1e-3)

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at the mean rate; None at first."""
        done = self.done - self._done_before
        return (self.total - self.done) * self._seconds / done if done else None

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._seconds

    def rates(self) -> str:
        """Returns ``12/64 steps, 0.31 steps/s, 912 tokens/s``."""
        units = (self.done - self._done_before) / self._seconds
        return f"{self.done}/{self.total} {self.unit}, {units:.2f} {self.unit}/s, {self.tokens_per_s:.0f} tokens/s"


class Player(Protocol):
    """The part of an algorithm that tells the time left."""

    def plays(self, run: RunDir) -> Artefact | None: ...

    def opponents(self, config: SpinConfig, iteration: int) -> int: ...


class RunProgress:
    """Progress of the run, including earlier drivers' stages."""

    def __init__(self, run: RunDir, config: SpinConfig, algorithm: Player, console: Console | None = None) -> None:
        self._run, self._config, self._algorithm = run, config, algorithm
        self._console = console or Console(stderr=True)
        self._attempts: list[Span] = []
        self._forecast: Forecast | None = None
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        with suppress(StageError, RunDirError):  # what cannot be reported never fails the run
            close_lost_attempt(self._run.storage, read_progress(self._run).get("time", 0.0))
        self._thread = threading.Thread(target=self._watch, name="run-progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        if self._console.is_terminal:
            with _log_above(Live(get_renderable=self.view, console=self._console, redirect_stdout=False)):
                self._tell_every(1)
        else:
            self._tell_every(STATE_EVERY_S / 3)

    def _tell_every(self, seconds: float) -> None:
        """Reports until the run is over. A failed report never fails the run."""
        started = time.monotonic()
        next_state, next_line, complained = started + STATE_AFTER_S, started + LINE_EVERY_S, False
        while not self._stop.wait(seconds):
            now = time.monotonic()
            try:
                self.look()
                if now >= next_state:
                    next_state = now + STATE_EVERY_S
                    self._run.storage.replace(PROGRESS, json.dumps(self.state()).encode())
                if now >= next_line and not self._console.is_terminal:
                    next_line += LINE_EVERY_S
                    self._tell_line()
            except Exception as error:
                if not complained:
                    logger.warning("progress cannot be shown (%s: %s)", type(error).__name__, first_line(error))
                complained = True

    def _tell_line(self) -> None:
        """Logs the line, or writes it to the console of a program or notebook that shows no such log."""
        if logger.hasHandlers() and (logger.isEnabledFor(logging.INFO) or not self._console.is_jupyter):
            logger.info("%s", self.line())
        else:
            self._console.file.write(f"{time.strftime('%H:%M:%S')} {self.line()}\n")
            self._console.file.flush()

    def look(self) -> None:
        events = self._run.events()
        self._attempts = spans(of_driver(events))
        stage = StageProgress.current
        left_s = stage.seconds_left if stage else None
        played = self._algorithm.plays(self._run)
        play = Play(
            answered=played.path if played else None, opponents=partial(self._algorithm.opponents, self._config)
        )
        self._forecast = forecast(self._config, play, events, time.time(), left_s)

    def state(self) -> dict[str, Any]:
        stage, found = StageProgress.current, self._forecast
        state: dict[str, Any] = {"time": round(time.time(), 3), "line": self.line()}
        if stage:
            state |= {"stage": stage.stage, "done": stage.done, "total": stage.total, "unit": stage.unit}
            state |= {"tokens_per_s": round(stage.tokens_per_s, 1)}
        if found:
            for name, left in (("iteration", found.iteration), ("run", found.run)):
                state[f"{name}_left_s"] = round(left.seconds, 1)
                state[f"{name}_left_is_all"] = left.is_all
        return state

    def line(self) -> str:
        """Returns ``iteration 1 of 2 (iter_000): iter_000 training, 12/64 steps, …; iteration 3 min left; …``."""
        running = self._running()
        words = [f"{running.folder} {running.stage}" if running else "between stages"]
        if stage := StageProgress.current:
            words += [stage.rates(), *([f"{duration(stage.seconds_left)} left"] if stage.seconds_left else [])]
        elif running:
            words.append(f"for {duration(time.time() - running.start)}")
        return f"{self._where()}: {'; '.join([', '.join(words), *self._left()])}"

    def view(self) -> RenderableType:
        root = Text(self._run.storage.name, style="bold")
        head = Text("  ").join([root, Text(self._where()), *(Text(left) for left in self._left())])
        return Group(head, self._stages())

    def _stages(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for span in self._attempts[-6:]:
            is_running = span.outcome == "running"
            mark = {"commit": "[green]✓[/]", "running": "[cyan]▶[/]"}.get(span.outcome, "[red]✗[/]")
            seconds = time.time() - span.start if is_running else span.seconds
            length = duration(seconds) if is_running or span.is_end_known else "?"
            cells: list[RenderableType] = [mark, f"{span.folder} {span.stage}", length]
            stage = StageProgress.current
            if is_running and stage:
                left = f", {duration(stage.seconds_left)} left" if stage.seconds_left else ""
                cells += [ProgressBar(max(stage.total, 1), stage.done, width=24), stage.rates() + left]
            else:
                counted = [f"{span.counted[key]:,.0f} {key}" for key in ("rows", "tokens") if span.counted.get(key)]
                rate = span.counted.get("tokens_per_s")
                cells += ["", ", ".join([*counted, *([f"{rate:,.0f} tokens/s"] if rate else [])])]
            table.add_row(*cells)
        return table

    def _running(self) -> Span | None:
        last = self._attempts[-1] if self._attempts else None
        return last if last and last.outcome == "running" else None

    def _where(self) -> str:
        turn = self._forecast.turn if self._forecast else PREPARATION
        if turn == PREPARATION:
            return "preparing"
        if turn >= self._config.iterations:
            return f"evaluating {iterate_name(self._config.iterations)}"
        return f"iteration {turn + 1} of {self._config.iterations} ({iteration_name(turn)})"

    def _left(self) -> Iterator[str]:
        if self._forecast:
            if 0 <= self._forecast.turn < self._config.iterations:
                yield f"iteration {self._forecast.iteration}"
            yield f"run {self._forecast.run}"


def read_progress(run: RunDir) -> dict[str, Any]:
    """Returns the newest state that a driver wrote; empty without one."""
    try:
        return json.loads(run.storage.read(PROGRESS))
    except (FileNotFoundError, ValueError):
        return {}


@contextmanager
def _log_above(live: Live) -> Iterator[None]:
    """Sends the log through the live view's stderr, so that its lines appear above the view."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
    ]
    with live:
        before = [handler.setStream(sys.stderr) for handler in handlers]
        try:
            yield
        finally:
            for handler, stream in zip(handlers, before, strict=True):
                if stream is not None:
                    handler.setStream(stream)
