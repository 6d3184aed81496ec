"""The simulation of failures, against Young's and Daly's formulas and by hand."""

from dataclasses import replace
from math import sqrt

import pytest

from benchmarks.fleet import Fleet, Generation, Rules, Training, simulate
from spin_ray.planning.learner_cost import WORKERS_START_S

RULES = Rules(
    checkpoint_every_steps=100, max_failures=10**9, generation_failures=3, lease_timeout_s=60, resize_interval_s=300,
    least_nodes=4, checkpoint_s=30, engine_start_s=90,
)  # fmt: skip
CALM = Fleet(nodes=4, mtbf_s=1e12, slow=0, noise=0)
TRAINING = Training(steps=1000, step_s=2.0)


def test_the_best_interval_of_checkpoints_is_youngs():
    """sqrt(2·C·M) (Young 1974), where M is that of 4 nodes and the driver's; half or twice as long costs more.

    At the best the saves and the repeated work together take C/T + T/2M of the time (Daly 2006, first order).
    """
    fleet = Fleet(nodes=4, mtbf_s=5 * 20_000, replaced_s=1, slow=0, noise=0)
    mean_s = fleet.mtbf_s / 5
    best = sqrt(2 * RULES.checkpoint_s * mean_s)
    long = Training(steps=2_000_000, step_s=2.0)
    found = {}
    for factor in (0.25, 0.5, 1, 2, 4):
        rules = replace(RULES, checkpoint_every_steps=round(factor * best / long.step_s))
        told = simulate([long], fleet, rules, seed=0)
        assert told.failures > 100
        found[factor] = told
    assert max(found, key=lambda factor: found[factor].goodput) == 1
    told, share = found[1], RULES.checkpoint_s / best + best / (2 * mean_s)
    assert (told.saving + told.lost / 4) / told.ideal == pytest.approx(share, rel=0.15)


def test_without_failures_only_checkpoints_cost_time():
    """1000 steps in hundreds: 9 checkpoints of 30 s; the tenth hundred ends with the export."""
    told = simulate([TRAINING], CALM, RULES, seed=0)
    assert told.ideal == WORKERS_START_S + 2000
    assert told.seconds == told.ideal + 9 * 30
    assert (told.failures, told.lost, told.submissions) == (0, 0, 1)


def test_a_queue_of_shards_takes_the_rounds_of_its_engines():
    """10 shards on 4 engines: three rounds after the start, of which two places stay empty."""
    told = simulate([Generation(shards=10, shard_s=50, engines=4)], CALM, RULES, seed=0)
    assert told.seconds == told.ideal == 90 + 3 * 50
    assert told.waited == 4 * 240 - 10 * 50


def test_the_same_seed_gives_the_same_run_and_failures_lose_no_more_than_what_ran():
    rough = Fleet(nodes=4, mtbf_s=4000, replaced_s=100)
    stages = [Generation(shards=200, shard_s=50, engines=8), TRAINING]
    told = simulate(stages, rough, RULES, seed=1)
    assert told == simulate(stages, rough, RULES, seed=1) != simulate(stages, rough, RULES, seed=2)
    assert told.failures > 3 and told.goodput < 1
    assert told.lost <= told.failures * 4 * (100 * 2.0 * 1.3 + 30)


def test_too_many_failures_of_one_stage_need_another_submission():
    """``train.max_failures`` restarts, then the command again, once the lease is stale."""
    rough = Fleet(nodes=4, mtbf_s=1500, replaced_s=10)
    patient, strict = (simulate([TRAINING], rough, replace(RULES, max_failures=most), seed=0) for most in (10**9, 0))
    assert strict.submissions > patient.submissions


def test_an_elastic_group_does_not_wait_for_a_node_that_stays_away():
    """Nodes that come back after hours; three of four go on meanwhile."""
    away = Fleet(nodes=4, mtbf_s=20_000, replaced_s=50_000)
    stages = [Training(steps=5000, step_s=2.0)]
    fixed, elastic = (simulate(stages, away, replace(RULES, least_nodes=least), seed=3).seconds for least in (4, 2))
    assert elastic < fixed
