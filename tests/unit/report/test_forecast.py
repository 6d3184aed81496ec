"""Time left, by hand: what a kind of stage took, times the work that is left of it."""

from typing import Any

import pytest

from spin_ray.report.forecast import Play, forecast, turn_of
from spin_ray.run_dir.events import duration, exact_duration, fields_of
from tests.support.fakes import config_of

CONFIG = config_of(
    data={"train": "d", "heldout": "h"}, iterations=2, sft={"learning_rate": 1e-5}, objective={"window": 2}
)
SPIN = Play(answered="prompts", opponents=CONFIG.objective.opponents)


def events_of(*stages: tuple[str, float, dict[str, Any]]) -> list[dict[str, Any]]:
    """Committed stages one after another from time 0: (name, seconds, what they counted)."""
    clock, found = 0.0, []
    for name, seconds, counted in stages:
        found.append({"time": clock, "event": "start", **fields_of(name)})
        clock += seconds
        found.append({"time": clock, "event": "commit", **fields_of(name), "seconds": seconds, **counted})
    return found


PREPARED = [("prompts", 5, {"rows": 100}), ("heldout", 1, {"rows": 20}), ("sft/training", 30, {"rows": 100})]
FIRST_TURN = [
    ("sft/heldout_samples + iter_000/generations", 60, {"rows": 120}),
    ("sft/evaluation", 1, {"rows": 20}),
    ("iter_000/pairs", 2, {"rows": 100}),
    ("iter_000/training", 100, {"rows": 100}),
]


@pytest.mark.parametrize(
    ("stage", "turn"),
    [
        ("prompts", -1), ("heldout", -1), ("sft/training", -1), ("reviser/training", -1),
        ("sft/heldout_samples + iter_000/generations", 0),
        ("iter_000/generations", 0), ("sft/evaluation", 0), ("iter_000/pairs", 0), ("iter_000/training", 0),
        ("iter_000/heldout_samples + iter_001/generations", 1), ("iter_000/evaluation", 1), ("iter_001/training", 1),
    ],
)  # fmt: skip
def test_what_an_iterate_does_is_its_turn_and_what_makes_it_the_one_before(stage, turn):
    assert turn_of(fields_of(stage)) == turn


def test_before_anything_has_started_nothing_is_foretold():
    assert forecast(CONFIG, SPIN, [], 0.0, None) is None


def test_kinds_that_no_turn_has_shown_come_on_top():
    """Training has just begun, and says itself that 70 s are left; the iteration ends with it."""
    events = [
        *events_of(*PREPARED, *FIRST_TURN[:3]),
        {"time": 99.0, "event": "start", **fields_of("iter_000/training")},
    ]
    found = forecast(CONFIG, SPIN, events, 110.0, 70.0)
    assert (found.turn, found.iteration.seconds, found.iteration.is_all) == (0, 70.0, True)
    # Turn 1: sampling 60, pairs 2. Turn 2: sampling 20 of 120 rows, 10. Training is not known, nor is evaluation.
    assert (found.run.seconds, found.run.is_all) == (70 + 60 + 2 + 10, False)
    assert str(found.run) == "over 2 min left"
    first = forecast(CONFIG, SPIN, [{"time": 0.0, "event": "start", **fields_of("prompts")}], 1.0, None)
    assert str(first.run) == "time left not known yet"


def test_a_turn_with_twice_the_pairs_trains_twice_as_long():
    """10 s of 60 into the sampling of turn 1: 50 + 2 + 200 for the iteration, evaluation not known yet."""
    stages = events_of(*PREPARED, *FIRST_TURN)
    start = {
        "time": stages[-1]["time"],
        "event": "start",
        **fields_of("iter_000/heldout_samples + iter_001/generations"),
    }
    found = forecast(CONFIG, SPIN, [*stages, start], start["time"] + 10, None)
    assert (found.turn, found.iteration.seconds, found.iteration.is_all) == (1, pytest.approx(252), False)


@pytest.mark.parametrize(("answered", "last"), [(None, 60), ("questions", 20)])
def test_an_algorithm_without_a_window_trains_each_time_as_long(answered, last):
    """Turn 1: sampling 60, pairs 2, training 100. Sampling at the end is of 20 held-out rows: of 20, or of 20 + 40."""
    events = events_of(*PREPARED, ("questions", 1, {"rows": 40}), *FIRST_TURN)
    play = Play(answered=answered, opponents=lambda _: 1)
    found = forecast(CONFIG, play, events, events[-1]["time"], None)
    assert found.run.seconds == pytest.approx(60 + 2 + 100 + last)


def test_once_each_kind_was_seen_the_whole_run_is_foretold():
    """Evaluation took 40 s with four sets of scores, so it takes 50 with five; 10 for sampling the last iterate."""
    second = [("iter_000/heldout_samples + iter_001/generations", 60, {}), ("iter_000/evaluation", 40, {})]
    events = events_of(*PREPARED, *FIRST_TURN, *second)
    found = forecast(CONFIG, SPIN, events, events[-1]["time"], None)
    assert (found.iteration.seconds, found.run.seconds) == (pytest.approx(202), pytest.approx(202 + 10 + 50))
    assert found.iteration.is_all and found.run.is_all


def test_attempts_that_failed_count_as_time_that_the_stage_takes():
    """40 s were lost in a failure, then 100: the next training, of twice the pairs, is expected to take 280."""
    failed = {"time": 139.0, "event": "failure", **fields_of("iter_000/training"), "seconds": 40.0}
    stages = events_of(*PREPARED, *FIRST_TURN)
    events = [*stages[:-2], failed, *stages[-2:]]
    found = forecast(CONFIG, SPIN, events, stages[-1]["time"], None)
    assert found.iteration.seconds == pytest.approx(60 + 2 + 280)


@pytest.mark.parametrize(
    ("told", "expected", "is_all"),
    [([], 62, False), ([{"time": 7400.0, "event": "lost", "seconds": 7200.0}], 62 + 2 * (7200 + 720), True)],
)
def test_work_of_a_killed_driver_is_part_of_the_price_or_there_is_no_price(told, expected, is_all):
    """It trained for 7,200 s, and the next one ended the training in 720. Turn 1 has twice the pairs."""
    stages = events_of(*PREPARED, *FIRST_TURN[:3])
    training = fields_of("iter_000/training")
    resumed = [
        {"time": 112.0, "event": "start"}, *told, {"time": 7400.0, "event": "start"},
        {"time": 8120.0, "event": "commit", "seconds": 720.0},
    ]  # fmt: skip
    events = [*stages, *(training | line for line in resumed)]
    config = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"heldout": None})})
    found = forecast(config, SPIN, events, 8120.0, None)
    assert (found.turn, found.iteration.seconds, found.iteration.is_all) == (1, pytest.approx(expected), is_all)


def test_a_benchmark_beside_the_run_is_no_stage_of_it():
    start = {"time": 300.0, "event": "start", **fields_of("sft/benchmarks")}
    events = events_of(*PREPARED, *FIRST_TURN)
    assert forecast(CONFIG, SPIN, [*events, start], 300.0, None) == forecast(CONFIG, SPIN, events, 300.0, None)


def test_stages_that_other_algorithms_add_are_learned_from_their_first_turn():
    """Preferences took 25 s in turn 0, so turn 1 is given 25 more."""
    plain = forecast(CONFIG, SPIN, events_of(*PREPARED, *FIRST_TURN), 300.0, None)
    more = events_of(*PREPARED, *FIRST_TURN[:2], ("iter_000/preferences", 25, {}), *FIRST_TURN[2:])
    found = forecast(CONFIG, SPIN, more, 325.0, None)
    assert found.iteration.seconds == pytest.approx(plain.iteration.seconds + 25)


def test_a_stage_that_belongs_to_no_iterate_is_no_surprise():
    """SEFT trains its reviser in the middle of turn 0."""
    start = {"time": 97.0, "event": "start", **fields_of("reviser/training")}
    found = forecast(CONFIG, SPIN, [*events_of(*PREPARED, *FIRST_TURN[:2]), start], 98.0, None)
    assert not found.run.is_all


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (89, "89 s"), (150, "2 min"), (7200, "2.0 h")])
def test_durations_are_said_shortly(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.1629, "163 ms"), (45.2, "45 s"), (588, "9 min 48 s"), (11117, "3 h 5 min")]
)
def test_durations_are_said_exactly(seconds, text):
    assert exact_duration(seconds) == text
