"""The time left of an iteration and of the run, from the times of earlier stages.

Turn t evaluates θ_t and trains θ_{t+1}; turn −1 prepares. A stage's time is assumed proportional to its work.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from spin_ray.config.recipe import SpinConfig
from spin_ray.run_dir.events import Event, Span, duration, of_driver, spans
from spin_ray.run_dir.names import is_iterate_name, iterate_number

PREPARATION = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """Rows that the algorithm answers and learns from in an iteration."""

    answered: str | None
    """Stage whose rows θ_t answers, e.g. ``prompts``; None: it answers none."""
    opponents: Callable[[int], int]
    """Function that returns the number of iterates whose responses an iteration learns from."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A stage of the run, done or not."""

    turn: int
    kind: str
    work: float
    """Amount of work, relative to other stages of this kind."""


@dataclass(frozen=True, slots=True)
class Left:
    seconds: float
    is_all: bool
    """False if stages of unknown time come on top."""

    def __str__(self) -> str:
        if self.is_all:
            return f"{duration(self.seconds)} left"
        return f"over {duration(self.seconds)} left" if self.seconds else "time left not known yet"


@dataclass(frozen=True, slots=True)
class Forecast:
    turn: int
    iteration: Left
    run: Left


def forecast(
    config: SpinConfig, play: Play, events: Sequence[Event], now: float, running_left_s: float | None
) -> Forecast | None:
    """Returns the forecast; None before the first stage. ``running_left_s`` is the running stage's own estimate."""
    attempts = spans(map(_by_turn, of_driver(events)))
    if not attempts:
        return None
    done = {_place(span) for span in attempts if span.outcome == "commit"}
    running = attempts[-1] if attempts[-1].outcome == "running" else None
    plan = list(_expected(config, play, attempts, done))
    rates = dict(_rates(plan, attempts, done))
    turn = _place(attempts[-1])[0]
    if running is None and all((it.turn, it.kind) in done for it in plan if it.turn == turn):
        turn = min((it.turn for it in plan if (it.turn, it.kind) not in done), default=turn)
    # Stages before the running one are done, or had nothing to do.
    places = [(it.turn, it.kind) for it in plan]
    passed = places.index(_place(running)) if running and _place(running) in places else 0
    left: list[tuple[int, float | None]] = []
    for it in plan[passed:]:
        if (it.turn, it.kind) in done:
            continue
        guess = rates[it.kind] * it.work if it.kind in rates else None
        if running and (it.turn, it.kind) == _place(running):
            known = max(0.0, guess - (now - running.start)) if guess is not None else None
            guess = known if running_left_s is None else running_left_s
        left.append((it.turn, guess))
    return Forecast(turn, _sum([guess for at, guess in left if at == turn]), _sum([guess for _, guess in left]))


def turn_of(event: Event) -> int:
    """Returns t for samples and evaluation of θ_t, t − 1 for stages that make θ_t."""
    if not is_iterate_name(event["folder"]):
        return PREPARATION
    return iterate_number(event["folder"]) - (0 if event["kind"] in ("heldout_samples", "evaluation") else 1)


def _by_turn(event: Event) -> Event:
    turn, kind = turn_of(event), event["kind"]
    if (event["folder"], kind) == ("sft", "training"):
        kind = "warm-up"
    if turn == 0 and kind == "evaluation":
        kind = "first_evaluation"
    return event | {"folder": str(turn), "kind": kind}


def _place(span: Span) -> tuple[int, str]:
    return int(span.folder), span.stage


def _sum(guesses: list[float | None]) -> Left:
    known = [guess for guess in guesses if guess is not None]
    return Left(sum(known), len(known) == len(guesses))


def _rates(
    plan: Sequence[Expected], attempts: Sequence[Span], done: set[tuple[int, str]]
) -> Iterator[tuple[str, float]]:
    """Yields seconds per unit of work by kind, the newest turn last.

    A stage with an attempt of unknown length has none: its other attempts did a part of the work.
    """
    for it in sorted(plan, key=lambda it: it.turn):
        if (it.turn, it.kind) in done:
            mine = [span for span in attempts if _place(span) == (it.turn, it.kind)]
            if all(span.is_end_known for span in mine):
                yield it.kind, sum(span.seconds for span in mine) / max(it.work, 1e-9)


def _expected(
    config: SpinConfig, play: Play, attempts: Sequence[Span], done: set[tuple[int, str]]
) -> Iterator[Expected]:
    """Yields the stages of SPIN, and others that an earlier turn had."""
    rows = {span.stage: span.counted.get("rows", 0) for span in attempts if span.outcome == "commit"}
    heldout = float(rows.get("heldout", 1)) if config.data.holds_out else 0.0
    prompts = float(rows.get(play.answered or "prompts", 1))
    learned = config.generation.samples_per_prompt * min(config.data.prompts_per_iteration or prompts, prompts)
    played = learned if play.answered else 0.0
    yield Expected(PREPARATION, "prompts", 1)
    if config.data.holds_out:
        yield Expected(PREPARATION, "heldout", 1)
    if config.sft:
        yield Expected(PREPARATION, "warm-up", 1)
    usual = {"sampling", "evaluation", "first_evaluation", "pairs", "training", "warm-up", "prompts", "heldout"}
    others = {kind: turn for turn, kind in sorted(done, reverse=True) if kind not in usual and turn >= 0}
    for turn in range(config.iterations + 1):
        is_last = turn == config.iterations
        if answers := config.evaluation.samples * heldout + (0 if is_last else played):
            yield Expected(turn, "sampling", answers)
        if heldout:
            # Samples of θ_t and its opponent under both models, and samples of θ_t under θ_0. Turn 0 scores nothing.
            yield Expected(turn, "evaluation" if turn else "first_evaluation", 4 if turn == 1 else 5)
        if is_last:
            continue
        yield Expected(turn, "pairs", learned)
        yield Expected(turn, "training", learned * play.opponents(turn) * config.at(turn).epochs)
        for kind, first in others.items():
            if turn >= first:
                yield Expected(turn, kind, 1)
