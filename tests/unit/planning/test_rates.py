"""Rates that a card has shown, in place of the assumption."""

from dataclasses import asdict, replace

import pytest

from spin_ray.planning import rates
from spin_ray.planning.hardware import COMPUTE_EFFICIENCY, DEVICE_NAMES, GPUS
from spin_ray.planning.learner_cost import WORKERS_START_S, scoring_cost, training_cost
from spin_ray.planning.model_shape import MISTRAL_7B
from spin_ray.planning.rates import MeasuredRate, rate_of
from tests.support.paths import RECIPES, ROOT
from tests.support.planning_cases import A100, PAPER_WORK, RMSPROP, ZEPHYR, devices, flat, pair_packs

MEASURED = MeasuredRate(
    card="A100-80G", stage="training", parameters=7e9, mfu=0.5, measured="2026-01-02", commit="abc1234"
)


@pytest.fixture
def one_measurement(monkeypatch):
    monkeypatch.setattr(rates, "known_rates", lambda: (MEASURED,))


@pytest.mark.parametrize(("stage", "backward"), [("training", True), ("scoring", False)])
def test_a_plan_of_the_measured_case_takes_the_measured_time(stage, backward, monkeypatch):
    """64 pairs of 130 + 256 + 256 tokens in one step, 20 % of the card's rate by the benchmark's count."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_steps.sizes import needed_of

    measured = MeasuredRate(**asdict(MEASURED) | {"stage": stage, "mfu": 0.2})
    monkeypatch.setattr(rates, "known_rates", lambda: (measured,))
    row = {"prompt_ids": [0] * 130, "real_ids": [0] * 256, "generated_ids": [0] * 256}
    spent = needed_of(MISTRAL_7B, 64 * [row], backward=backward) / (0.2 * A100.bf16)
    alone = ZEPHYR.with_train(workers=1, gradient_checkpointing=False)
    packs = pair_packs(alone, replace(PAPER_WORK, rows=64), 0)
    device = devices(A100).train
    predicted = (
        training_cost(alone, MISTRAL_7B, device, packs, 1, RMSPROP, flat(alone)).seconds - WORKERS_START_S
        if backward
        else scoring_cost(alone, MISTRAL_7B, device, packs, flat(alone)).seconds
    )
    assert predicted == pytest.approx(spent, rel=0.02)


def test_the_stage_that_was_measured_takes_its_rate_and_no_other_does(one_measurement):
    """0.5 of the peak in place of 0.4 makes the steps, but not the start of the workers, 0.8 of the time."""
    alone = ZEPHYR.with_train(workers=1)  # nothing is sent
    packs = pair_packs(alone, PAPER_WORK, 0)
    device = devices(A100).train
    training = training_cost(alone, MISTRAL_7B, device, packs, 1, RMSPROP, flat(alone))
    scoring = scoring_cost(alone, MISTRAL_7B, device, packs, flat(alone))
    per_flop = 1 / device.bf16
    assert training.seconds - 20 == pytest.approx(training.flops * per_flop / 0.5)
    assert scoring.seconds == pytest.approx(scoring.flops * per_flop / COMPUTE_EFFICIENCY)


@pytest.mark.parametrize(
    ("card", "stage", "parameters"),
    [("H100-80G", "training", 7e9), ("A100-80G", "scoring", 7e9), ("A100-80G", "training", 1.5e9)],
)
def test_no_rate_is_taken_from_another_card_stage_or_size(one_measurement, card, stage, parameters):
    assert rate_of(card, stage, parameters) is None


def test_the_plan_names_the_card_and_the_date_of_a_rate(one_measurement, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = ("--prompt-tokens", "130", "--response-tokens", "256")
    _, out, _ = call("plan", RECIPES / "zephyr_7b.yaml", "--gpu", "A100-80G", *options)
    assert "Rate of training: 0.50 of the data sheet's, measured (A100-80G, 7B parameters, 2026-01-02" in out
    assert "Rate of scoring, generation: 0.40 of the data sheet's, an assumption; not measured on A100-80G" in out


def test_cards_by_the_drivers_names_are_known():
    assert set(DEVICE_NAMES.values()) == set(GPUS)
