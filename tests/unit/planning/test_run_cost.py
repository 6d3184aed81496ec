"""Hours of whole runs: more work takes longer, faster hardware less."""

from dataclasses import replace

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.planning.hardware import GPUS, Hardware
from spin_ray.planning.model_shape import MISTRAL_7B
from spin_ray.planning.run_cost import plan_run
from spin_ray.planning.work import Work
from tests.support.planning_cases import A100, PAPER_WORK, SPIN, ZEPHYR, devices


def hours(config: SpinConfig = ZEPHYR, gpu: Hardware = A100, work: Work = PAPER_WORK) -> float:
    return sum(phase.seconds for phase in plan_run(config, MISTRAL_7B, devices(gpu, config), work, SPIN)) / 3600


@pytest.mark.parametrize("field", ["rows", "prompt", "real", "generated", "heldout_rows"])
def test_more_of_anything_takes_longer(field):
    more = replace(PAPER_WORK, **{field: getattr(PAPER_WORK, field) * 2})
    assert hours(work=more) > hours()


def test_faster_hardware_takes_less_time():
    assert hours(gpu=GPUS["H100-80G"]) < hours() < hours(gpu=GPUS["L4"])
