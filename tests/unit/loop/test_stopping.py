"""A run that ends by its rule says why, once, and is finished."""

import pytest

from spin_ray.config.sections import SpinConfig
from spin_ray.loop.driver import _should_stop
from spin_ray.loop.launch import is_finished
from spin_ray.report.history import read_evaluations
from spin_ray.report.page.view import read_view
from spin_ray.run_dir.names import iterate_number
from tests.support.made_up_run import made_up_run


@pytest.fixture
def stalled(tmp_path):
    """Two of four iterations are done; both distances are the same."""
    return made_up_run(tmp_path / "run", iterations=4, done=2, stop_when={})


def test_a_run_whose_distance_stopped_falling_is_finished(stalled):
    for iterate in range(1, iterate_number(stalled.latest()) + 1):
        stalled.model(iterate).commit({}, {}, {})
    assert is_finished(stalled, stalled.config())
    _should_stop(stalled, stalled.config(), read_evaluations(stalled, stalled.config()))
    assert read_view(stalled).state == "stopped by its rule"


def test_without_the_rule_it_goes_on(stalled):
    assert not is_finished(stalled, stalled.config().model_copy(update={"stop_when": None}))


def test_the_evidence_is_logged_once(stalled):
    config = stalled.config()
    for _ in range(2):
        assert _should_stop(stalled, config, read_evaluations(stalled, config))
    [event] = [event for event in stalled.events() if event["event"] == "stop"]
    assert event["stage"] == "iter_001"
    assert event["distances"].keys() == {"sft", "iter_000"}
    assert "has not fallen for 1 iteration(s)" in event["reason"]


def test_a_rule_needs_held_out_rows():
    with pytest.raises(ValueError, match=r"need data\.heldout"):
        SpinConfig.model_validate({"model": {"path": "m"}, "data": {"train": "d"}, "stop_when": {}})


def test_the_rule_is_no_part_of_what_the_run_is(stalled):
    config = stalled.config()
    assert config.identity() == config.model_copy(update={"stop_when": None}).identity()
