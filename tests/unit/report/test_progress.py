"""The live view on a terminal, the line in a log, and the file that ``status`` reads."""

import io
import json
import logging
import time

import pytest
from rich.console import Console

from spin_ray.loop.algorithms.table import find_algorithm
from spin_ray.report import progress
from spin_ray.report.progress import PROGRESS, RunProgress, StageProgress
from spin_ray.report.status import print_status
from spin_ray.run_dir.lease import Lease
from tests.support.made_up_run import made_up_run


@pytest.fixture
def run(tmp_path):
    """Two of three iterations are done; the third is being trained, and has done 3 of 12 steps of 500 tokens in 6 s."""
    run = made_up_run(tmp_path / "run", iterations=3, done=2)
    run.event("start", "iter_002/training")
    with Lease(run.storage, timeout_s=60):
        yield run


@pytest.fixture
def stage(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with StageProgress("iter_002/training", 12, "steps") as stage:
        for _ in range(3):
            clock[0] += 2
            stage.advance(1, 500)
        yield stage


def test_rates_are_those_since_the_stage_went_on(monkeypatch):
    """4 of 12 were there before; 2 steps and 1000 tokens in 5 s, so 6 steps need 15 s."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stage = StageProgress("s", 12, "steps", done=4)
    assert stage.seconds_left is None
    clock[0] = 5
    stage.advance(2, 1000)
    assert stage.rates() == "6/12 steps, 0.40 steps/s, 200 tokens/s"
    assert stage.seconds_left == 15


def test_the_line_has_rows_rates_and_the_time_left_of_stage_iteration_and_run(run, stage):
    told = RunProgress(run, run.config(), find_algorithm("spin"))
    told.look()
    line = told.line()
    assert line.startswith("iteration 3 of 3 (iter_002): iter_002 training, 3/12 steps, 0.50 steps/s, 250 tokens/s")
    assert ", 18 s left; iteration " in line
    assert "; run " in line


def test_a_benchmark_beside_the_training_leaves_the_training_s_line_and_bar(run, stage):
    run.event("start", "sft/benchmarks")
    out = io.StringIO()
    console = Console(file=out, width=160)
    told = RunProgress(run, run.config(), find_algorithm("spin"), console)
    told.look()
    assert "iter_002 training, 3/12 steps" in told.line()
    console.print(told.view())
    last = out.getvalue().splitlines()[-1]
    assert "iter_002 training" in last and "3/12 steps" in last


@pytest.mark.parametrize(("algorithm", "left"), [("spin", 28), ("continued_sft", 14), ("dpo", 14)])
def test_the_training_of_two_opponents_takes_twice_as_long_with_spin_alone(tmp_path, algorithm, left):
    """The training of iteration 0 took 14 s. The window is 2 in every recipe, and only SPIN reads it."""
    run = made_up_run(tmp_path / "run", iterations=2, done=1, algorithm=algorithm)
    told = RunProgress(run, run.config(), find_algorithm(algorithm))
    told.look()
    assert told.state()["iteration_left_s"] == left


def test_the_view_has_the_stages_that_are_done_and_a_bar_for_the_running_one(run, stage):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140, color_system=None)
    told = RunProgress(run, run.config(), find_algorithm("spin"), console)
    told.look()
    console.print(told.view())
    lines = out.getvalue().splitlines()
    assert "run  iteration 3 of 3 (iter_002)  iteration 18 s left" in lines[0]
    assert any("✓" in line and "iter_001 evaluation" in line and "50 tokens" in line for line in lines)
    assert "▶" in lines[-1] and "━" in lines[-1] and "3/12 steps, 0.50 steps/s, 250 tokens/s, 18 s left" in lines[-1]


@pytest.mark.slow
def test_a_terminal_shows_the_view_and_lines_of_the_log_above_it(run):
    """In real time: a second until the log is read, and a quarter until it is drawn; more where cores are busy."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140)
    deadline = time.monotonic() + 60
    with (
        RunProgress(run, run.config(), find_algorithm("spin"), console),
        StageProgress("iter_002/training", 12, "steps") as stage,
    ):
        stage.advance(3, 500)
        while not ("iteration 3 of 3" in out.getvalue() and "3/12 steps" in out.getvalue()):
            assert time.monotonic() < deadline, out.getvalue()
            time.sleep(0.05)


def test_a_log_gets_a_plain_line_a_minute_and_status_a_file(run, stage, caplog, monkeypatch):
    """Looked at every 5 s from second 106 on: the file after 10 s, one line after each 60."""
    told = RunProgress(run, run.config(), find_algorithm("spin"), Console(file=io.StringIO()))
    looks = iter(range(5, 131, 5))

    def wait(_: float) -> bool:
        second = next(looks, None)
        monkeypatch.setattr(progress.time, "monotonic", lambda: 106.0 + (second or 0))
        return second is None

    monkeypatch.setattr(told._stop, "wait", wait)
    caplog.set_level(logging.INFO)
    told._watch()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["iteration 3 of 3 (iter_002)"] * 2
    state = json.loads(run.storage.read(PROGRESS))
    assert (state["stage"], state["done"], state["total"], state["unit"]) == ("iter_002/training", 3, 12, "steps")
    assert {"iteration_left_s", "run_left_s", "tokens_per_s"} <= state.keys()
    out = io.StringIO()
    print_status(run, Console(file=out, width=300))
    assert f"Running: {state['line']} (written 0 s ago)" in out.getvalue()


@pytest.mark.parametrize(
    ("handlers", "level", "jupyter", "written"),
    [
        ([], logging.WARNING, True, True),
        ([], logging.INFO, False, True),
        ([logging.NullHandler()], logging.WARNING, True, True),
        ([logging.NullHandler()], logging.WARNING, False, False),
        ([logging.NullHandler()], logging.INFO, True, False),
    ],
)
def test_the_line_reaches_who_has_set_up_no_log(run, stage, monkeypatch, handlers, level, jupyter, written):
    """A run in a notebook was silent for hours: no terminal, and nobody shows logs of the level INFO."""
    monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
    monkeypatch.setattr(logging.getLogger(), "level", level)
    logging.getLogger().manager._clear_cache()  # of isEnabledFor
    out = io.StringIO()
    told = RunProgress(run, run.config(), find_algorithm("spin"), Console(file=out, force_jupyter=jupyter))
    told._tell_line()
    logging.getLogger().manager._clear_cache()
    assert ("3/12 steps, 0.50 steps/s" in out.getvalue()) == written


@pytest.mark.parametrize(("seen", "lost"), [(7200.0, [7200.0]), (-5.0, []), (None, [])])
def test_the_next_driver_logs_how_long_a_killed_one_was_seen_alive(run, seen, lost):
    """A report older than the stage says nothing of it."""
    if seen is not None:
        state = {"time": run.events()[-1]["time"] + seen, "line": ""}
        run.storage.replace(PROGRESS, json.dumps(state).encode())
    for _ in range(2):
        with RunProgress(run, run.config(), find_algorithm("spin"), Console(file=io.StringIO())):
            pass
    told = [(event["stage"], event["seconds"]) for event in run.events() if event["event"] == "lost"]
    assert told == [("iter_002/training", pytest.approx(seconds)) for seconds in lost]


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(run, caplog, monkeypatch):
    def fail() -> None:
        raise OSError("gone")

    told = RunProgress(run, run.config(), find_algorithm("spin"), Console(file=io.StringIO()))
    monkeypatch.setattr(told, "look", fail)
    answers = iter([False, False, True])
    monkeypatch.setattr(told._stop, "wait", lambda _: next(answers))
    told._watch()
    assert [record.message for record in caplog.records] == ["progress cannot be shown (OSError: gone)"]


def test_status_does_not_take_what_an_earlier_stage_told_for_news(run):
    run.storage.replace(PROGRESS, json.dumps({"time": 1.0, "line": "long ago"}).encode())
    out = io.StringIO()
    print_status(run, Console(file=out, width=300))
    assert "long ago" not in out.getvalue()
    assert "Running: iter_002 training for " in out.getvalue()
