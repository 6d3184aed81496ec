"""Limits on a collapsing run, by means over several steps."""

import pytest

from spin_ray.config.sections import HealthConfig
from spin_ray.errors import HealthError
from spin_ray.learner.health import HealthMonitor
from spin_ray.loop.stages import pairs
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import GENERATION_SCHEMA
from spin_ray.run_dir.storage import Storage
from tests.support.fakes import config_of, generation_rows, write_rows

HEALTHY = {"loss": 0.5, "margin": 1.0, "real_logp": -100.0, "real_logp_drift": 0.0}


def monitor(**limits: object) -> HealthMonitor:
    return HealthMonitor(HealthConfig.model_validate({"steps": 3} | limits), 9)


def test_one_bad_step_does_not_stop_a_run_and_a_lasting_one_does():
    """Margins 1, 1, 40, 1, 1: means of three are at most 14. Then 80 and 80: (1 + 80 + 80) / 3 = 53.7 > 30."""
    watched = monitor()
    for step, margin in enumerate([1, 1, 40, 1, 1]):
        watched.check(step, HEALTHY | {"margin": margin})
    watched.check(5, HEALTHY | {"margin": 20})
    watched.check(6, HEALTHY | {"margin": 60})
    with pytest.raises(HealthError, match=r"after step 7: the margin is 53.3 over the last 3 steps, .*max_margin 30"):
        watched.check(7, HEALTHY | {"margin": 80})


def test_an_iteration_with_fewer_steps_than_the_mean_takes_is_judged_by_all_of_them():
    watched = HealthMonitor(HealthConfig(steps=5, max_margin=5), 2)
    watched.check(0, HEALTHY | {"margin": 9})
    with pytest.raises(HealthError, match="the margin is 8 over the last 2 steps"):
        watched.check(1, HEALTHY | {"margin": 7})


def test_a_margin_that_runs_away_downwards_counts_too():
    watched = monitor(steps=1)
    with pytest.raises(HealthError, match="max_margin"):
        watched.check(0, HEALTHY | {"margin": -31.0})


def test_the_drop_of_log_p_is_a_share_of_what_it_was():
    """log p(y) was -100 and is -149, then -151, of a limit of a half."""
    watched = monitor(steps=1)
    watched.check(0, HEALTHY | {"real_logp": -149.0, "real_logp_drift": -49.0})
    with pytest.raises(HealthError, match=r"log p\(y\) fell is 0.51 .*max_real_logp_drop 0.5"):
        watched.check(1, HEALTHY | {"real_logp": -151.0, "real_logp_drift": -51.0})


def test_limits_can_be_switched_off_and_supervised_steps_are_not_judged():
    off = monitor(steps=1, max_margin=None, max_real_logp_drop=None)
    off.check(0, HEALTHY | {"loss": 1e9, "margin": 1e9, "real_logp_drift": -1e9, "real_logp": -2e9})
    monitor(steps=1, max_loss=1.0).check(0, {"loss": 9.0, "real_logp": -50.0})


def test_limits_do_not_make_another_run():
    assert config_of(health={"max_margin": 1.0}).identity() == config_of().identity()


@pytest.mark.parametrize(("now", "stops"), [(1, True), (2, False), (32, False), (33, True)])
def test_responses_that_change_length_fourfold_stop_the_run(tmp_path, now, stops):
    """The first opponent answers with 8 tokens; a quarter is 2, four times is 32."""
    run = RunDir(Storage(tmp_path))
    for iteration, length in ((0, 8), (1, now)):
        rows = generation_rows([("p0", 0, [5] * length)])
        write_rows(run.generations(iteration), GENERATION_SCHEMA, rows, part_rows=1)
    if stops:
        with pytest.raises(HealthError, match=r"iter_001/generations: responses have .*health.max_length_change 4"):
            pairs._check_lengths(run.generations(1), run.generations(0), 4.0)
    else:
        pairs._check_lengths(run.generations(1), run.generations(0), 4.0)


def test_a_loss_without_a_margin_is_still_held_to_its_largest_loss():
    monitor = HealthMonitor(HealthConfig(steps=1, max_loss=2.0), 9)
    monitor.check(0, {"loss": 1.0, "generated_logp": -3.0, "real_logp": -2.0})
    with pytest.raises(HealthError, match="the loss is 3 "):
        monitor.check(1, {"loss": 3.0, "generated_logp": -3.0, "real_logp": -2.0})
