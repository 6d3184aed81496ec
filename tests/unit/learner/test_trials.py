"""A user's own loss or optimizer is tried on a few numbers before anything runs."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ConfigError
from spin_ray.learner.losses import LOSSES, MarginLoss, resolve_loss
from spin_ray.learner.trials import try_loss, try_optimizer

# Losses


def mean(margin):
    return functional.softplus(-margin).mean()


def two_arguments(margin, beta):
    return margin * beta


def in_numpy(margin):
    return margin.detach().numpy()


def nothing(margin):
    functional.softplus(-margin)


def detached(margin):
    return functional.softplus(-margin.detach())


def root(margin):
    return margin.abs().sqrt()


def over_deviation(margin):
    return functional.softplus(-margin / margin.std(correction=0))


def centred(margin):
    return functional.softplus(margin.mean() - margin)


def fp32_alone(margin):
    assert margin.dtype == torch.float32
    return functional.softplus(-margin)


def slightly_noisy(margin):
    return functional.softplus(-margin) * (1 + 0.01 * torch.rand(margin.shape))


class Own:
    needs_reference = True
    needs_wins = False
    per = "pair"

    def __call__(self, policy, reference, wins, beta):
        return functional.softplus(-self.margin(policy, reference, beta)).sum()

    def margin(self, policy, reference, beta):
        return beta * (policy.real - reference.real)


class OfTokens(Own):
    per = "tokens"


class EachPair(Own):
    def __call__(self, policy, reference, wins, beta):
        return functional.softplus(-self.margin(policy, reference, beta))


class Mean(EachPair):
    def __call__(self, policy, reference, wins, beta):
        return super().__call__(policy, reference, wins, beta).mean()


class TwoArguments(Own):
    def __call__(self, policy, reference):
        return policy.real.sum()


class WithoutReference(Own):
    needs_reference = False


class OneMargin(Own):
    def margin(self, policy, reference, beta):
        return policy.real.mean()


class Baseline(Own):
    """A margin against the running mean of earlier packs."""

    mean: float | torch.Tensor = 0.0

    def seen(self, margin):
        return margin.detach().mean()

    def __call__(self, policy, reference, wins, beta):
        margin = self.margin(policy, reference, beta)
        self.mean = 0.9 * self.mean + 0.1 * self.seen(margin)
        return functional.softplus(self.mean - margin).sum()


class BaselineOfGraphs(Baseline):
    def seen(self, margin):
        return margin.mean()


class Noisy(Own):
    def __call__(self, policy, reference, wins, beta):
        return torch.rand(()) * super().__call__(policy, reference, wins, beta)


class Counted(Own):
    """Keeps the last value, with its graph, and reads it with weight 0."""

    last = 0.0

    def __call__(self, policy, reference, wins, beta):
        self.last = super().__call__(policy, reference, wins, beta) + 0 * self.last
        return self.last


def told_of_loss(loss):
    given = loss if isinstance(loss, Own) else MarginLoss(loss)
    with pytest.raises(ConfigError) as caught:
        try_loss(given, "my:loss", 0.5, in_fp64=True, on_gpus=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (mean, "my:loss gives shape () for 1 pair in float32; expected a tensor of shape (pairs,) = (1,)"),
        (two_arguments, "missing 1 required positional argument: 'beta'"),
        (in_numpy, "gives a ndarray"),
        (nothing, "gives a NoneType"),
        (detached, "has no gradient"),
        (root, "has a gradient that is not finite"),
        (over_deviation, "gives [nan] for 1 pair"),
        (fp32_alone, "fails in float64 (AssertionError"),
        (OfTokens(), "has per 'tokens'; expected 'pair' or 'token'"),
        (EachPair(), "gives shape (1,) for 1 pair in float32; expected a tensor of shape ()"),
        (Mean(), "gives the mean of the pairs; expected their sum"),
        (TwoArguments(), "takes 3 positional arguments but 5 were given"),
        (WithoutReference(), "'NoneType' object has no attribute 'real'"),
        (OneMargin(), "my:loss.margin gives shape ()"),
        (centred, "differs from the sum over each pair alone, 2.772589; expected a sum over pairs"),
        (Baseline(), " for the same pairs; a loss keeps nothing from one call to the next, and is deterministic"),
        (BaselineOfGraphs(), "keeps the graph of an earlier call; a loss keeps nothing from one call to the next"),
        (Counted(), "keeps the graph of an earlier call"),
        (Noisy(), " for the same pairs; a loss is deterministic: it draws no random numbers"),
        (slightly_noisy, " for the same pairs; a loss is deterministic: it draws no random numbers"),
    ],
    ids=lambda given: getattr(given, "__name__", type(given).__name__) if not isinstance(given, str) else "",
)
def test_a_loss_that_would_fail_or_train_on_something_else_is_refused(loss, said):
    assert f"objective.loss: my:loss{'.margin' if 'margin gives' in said else ''} " in told_of_loss(loss)
    assert said in told_of_loss(loss)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 10.0])
def test_a_loss_of_centred_margins_is_no_sum_at_any_beta(beta):
    with pytest.raises(ConfigError, match="expected a sum over pairs"):
        try_loss(MarginLoss(centred), "my:loss", beta, in_fp64=False, on_gpus=True)


def test_a_loss_that_is_not_evaluated_may_work_in_fp32_alone():
    try_loss(MarginLoss(fp32_alone), "my:loss", 0.5, in_fp64=False, on_gpus=False)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [1e-3, 10.0])
def test_the_losses_of_the_package_pass(name, beta):
    try_loss(resolve_loss(name), str(name), beta, in_fp64=True, on_gpus=False)


def of_cards(margin):
    raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")


def test_a_loss_for_cards_is_not_refused_for_failing_on_a_cpu(caplog):
    try_loss(MarginLoss(of_cards), "my:loss", 0.5, in_fp64=False, on_gpus=True)
    assert "objective.loss: my:loss could not be tried on this CPU (ValueError: Pointer argument" in caplog.text
    with pytest.raises(ConfigError, match="missing 1 required positional argument: 'beta'"):
        try_loss(MarginLoss(two_arguments), "my:loss", 0.5, in_fp64=False, on_gpus=True)


# Optimizers


class NeedsMomentum(torch.optim.SGD):
    def __init__(self, parameters, lr, momentum):
        super().__init__(parameters, lr=lr, momentum=momentum)


class Unpicklable(torch.optim.SGD):
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["function"] = lambda: 0


class OfCards(torch.optim.SGD):
    def step(self):
        raise ValueError("Default process group has not been initialized")


def no_optimizer(parameters, lr):
    return nn.Linear(1, 1)


def trial(name, *, matrices_only=False, on_gpus=False):
    path = name if ":" in name else f"{__name__}:{name}"
    try_optimizer(OptimizerConfig(name=path), matrices_only=matrices_only, on_gpus=on_gpus)


@pytest.mark.parametrize("on_gpus", [False, True])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("NeedsMomentum", "missing 1 required positional argument: 'momentum'"),
        ("Unpicklable", "has a state that no checkpoint can hold"),
        ("no_optimizer", "makes a Linear; expected a torch.optim.Optimizer"),
        ("torch.nn:Linear", "unexpected keyword argument 'lr'"),
        ("torch.optim:LBFGS", "missing 1 required positional argument: 'closure'"),
        ("torch.optim:Muon", "fails on a small matrix and a vector .*only supports 2D parameters"),
        ("torch.optim:SparseAdam", "does not support dense gradients"),
    ],
)
def test_an_optimizer_that_would_fail_in_training_is_refused(name, said, on_gpus):
    with pytest.raises(ConfigError, match=f"^optimizer.name: .*{said}"):
        trial(name, on_gpus=on_gpus)


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad", "NAdam", "ASGD"])
def test_optimizers_of_torch_pass(name):
    trial(f"torch.optim:{name}")


def test_matrices_alone_suit_muon():
    trial("torch.optim:Muon", matrices_only=True)


def test_an_optimizer_for_cards_is_not_refused_for_failing_on_a_cpu():
    trial("OfCards", on_gpus=True)
    with pytest.raises(ConfigError, match="Default process group"):
        trial("OfCards")


def test_an_optimizer_by_name_is_not_tried():
    try_optimizer(OptimizerConfig(name="adamw_8bit"), matrices_only=False, on_gpus=False)
    assert "bitsandbytes" not in sys.modules
