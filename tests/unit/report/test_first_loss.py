"""The loss of step 0 is that of the losses themselves at margin 0, and no other is shown."""

import pytest
import torch

from spin_ray.learner.losses import LOSSES, PairValues, SpaceLoss
from spin_ray.report.first_loss import first_loss, spelt
from tests.support.fakes import config_of

ZERO = torch.zeros(1, dtype=torch.float64)


@pytest.mark.parametrize("loss", ["logistic", "hinge", "exponential", "correlation", "space"])
def test_it_is_the_loss_where_the_policy_is_its_reference(loss):
    mu = 3.0 if loss == "space" else 1.0
    used = SpaceLoss(mu=mu) if loss == "space" else LOSSES[loss]
    expected = used(PairValues(ZERO, ZERO), PairValues(ZERO, ZERO), None, 1.0).item()
    assert first_loss(config_of(objective={"loss": loss, "mu": mu})) == pytest.approx(expected)


@pytest.mark.parametrize(
    "sections",
    [
        {"algorithm": "continued_sft"}, {"algorithm": "tspin"}, {"algorithm": "sdft"}, {"algorithm": "my_pkg:Mine"},
        {"objective": {"loss": "my_pkg:loss"}}, {"objective": {"reference_alpha": 0.5}},
    ],
)  # fmt: skip
def test_where_step_0_has_no_known_loss_none_is_shown(sections):
    assert first_loss(config_of(**sections)) is None


def test_ln_2_is_spelt_so():
    logistic, space = first_loss(config_of()), first_loss(config_of(objective={"loss": "space"}))
    assert (spelt(logistic or 0), spelt(space or 0)) == ("ln 2", "1.386")
