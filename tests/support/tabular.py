"""Tabular policies: softmax over K outcomes, with exact expectations."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

K = 6


def distribution(seed: int, spread: float = 1.0) -> Tensor:
    """Returns log p of a random distribution over K outcomes."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(K, generator=generator, dtype=torch.float64)).log_softmax(0)


def minimise(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Returns log p at the minimum. The logistic objective is convex in the logits, as margins are linear in them."""
    logits = start.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        value = function(logits)
        value.backward()
        return value

    lbfgs.step(closure)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-7, "not converged"
    return logits.detach().log_softmax(0)


def kl(p: Tensor, q: Tensor) -> float:
    return (p.exp() * (p - q)).sum().item()


def jsd(p: Tensor, q: Tensor) -> float:
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl(p, middle) + kl(q, middle)) / 2


def size(log_ratio: Tensor) -> float:
    """Returns the norm of a log-ratio up to its additive constant, which normalisation fixes."""
    return (log_ratio - log_ratio.mean()).norm().item()
