"""The head's own gradient, against autograd's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from spin_ray.learner import head as head_module
from spin_ray.learner.head import LogitTransform, target_logps

TRANSFORMS = [
    LogitTransform(), LogitTransform(scale=0.25), LogitTransform(softcap=2.0), LogitTransform(scale=3.0, softcap=2.0),
]  # fmt: skip


def case(dtype: torch.dtype, *, bias: bool) -> tuple[Any, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(8, 11, bias=bias, dtype=dtype)
    at = torch.tensor([0, 1, 1, 4, 2])
    return head, torch.randn(5, 8, dtype=dtype, requires_grad=True), at, torch.tensor([3, 0, 10, 3, 7])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradient_is_the_numerical_one(transform: LogitTransform, bias: bool) -> None:
    """In fp64, in two chunks."""
    head, hidden, at, ids = case(torch.float64, bias=bias)

    def logps(hidden: Tensor, *_: Tensor) -> Tensor:
        return target_logps(head, hidden, at, ids, transform, rows=33)

    expected = transform(head(hidden[at])).log_softmax(-1)[torch.arange(5), ids]
    torch.testing.assert_close(logps(hidden), expected)
    assert torch.autograd.gradcheck(logps, (hidden, *head.parameters()))


def test_heads_that_are_no_plain_linear_have_the_same_scores_and_gradients() -> None:
    """Such are heads with adapters, and DeepSpeed's."""
    found = []
    for wrap in (lambda head: head, nn.Sequential):
        head, hidden, at, ids = case(torch.float32, bias=False)
        logps = target_logps(wrap(head), hidden, at, ids, TRANSFORMS[-1], rows=2)
        (logps * torch.arange(1, 6)).sum().backward()
        found.append((logps, hidden.grad, head.weight.grad))
    torch.testing.assert_close(*found)


def test_the_weights_gradient_is_summed_in_fp32_over_chunks() -> None:
    """bf16 sums of 64 equal chunks stop growing; the true gradient is 64 times that of one."""
    head, hidden, _, _ = case(torch.bfloat16, bias=False)
    grads = []
    for copies in (1, 64):
        head.weight.grad = None
        at, ids = torch.zeros(64 * copies, dtype=torch.int64), torch.full((64 * copies,), 3)
        target_logps(head, hidden, at, ids, LogitTransform(), rows=64).sum().backward()
        grads.append(head.weight.grad.float() / copies)
    torch.testing.assert_close(grads[1], grads[0], rtol=2**-8, atol=0)


def test_a_frozen_head_costs_no_gradient() -> None:
    head, hidden, at, ids = case(torch.float32, bias=True)
    head.requires_grad_(False)
    target_logps(head, hidden, at, ids, LogitTransform()).sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None and hidden.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize("transform", [TRANSFORMS[0], TRANSFORMS[-1]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_fused_head_has_the_same_bits_in_one_graph_for_every_number_of_rows(
    transform: LogitTransform, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph, so that a chunk is scored and trained by one kernel."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(head_module, "COMPILER", counter)
    head_module._compiled.cache_clear()
    torch._dynamo.reset()
    found = []
    for fused in (False, True):
        head, hidden, _, _ = case(dtype, bias=True)
        at, ids = torch.arange(320) % 5, torch.arange(320) % 11
        logps = [target_logps(head, hidden, at[:n], ids[:n], transform, rows=128, fused=fused) for n in (320, 200)]
        (logps[0] * torch.arange(320)).sum().backward()
        found.append([*logps, hidden.grad, head.weight.grad, head.bias.grad])
    head_module._compiled.cache_clear()
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert counter.frame_count == 2  # forward and backward
