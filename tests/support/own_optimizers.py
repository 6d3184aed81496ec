"""Optimizers as users write them, each with its state in another place."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.optim import Optimizer


class Own(Optimizer):
    """Gradient descent with an optional value in its parameter group."""

    def __init__(self, parameters: Any, lr: float, **values: Any) -> None:
        super().__init__(parameters, {"lr": lr, **values})

    def each(self) -> Iterator[tuple[dict[str, Any], nn.Parameter, Tensor]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, parameter, parameter.grad


class CountsInGroups(Own):
    """Divides the rate by a count in its parameter groups, as Prodigy and schedule-free optimizers keep theirs."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr, count=0)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
        for group, parameter, gradient in self.each():
            self.state[parameter].setdefault("last", torch.zeros_like(parameter)).copy_(gradient)
            parameter.sub_(gradient, alpha=group["lr"] / group["count"])


class CountsInItself(Own):
    count = 0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.count += 1
        for group, parameter, gradient in self.each():
            parameter.sub_(gradient, alpha=group["lr"] / self.count)


class CountsForAll(Own):
    """Keeps its count beside the states of the parameters."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        shared = self.state["all"]  # type: ignore[index]
        shared["count"] = shared.get("count", 0) + 1
        for group, parameter, gradient in self.each():
            parameter.sub_(gradient, alpha=group["lr"] / shared["count"])


class CountsOutside(Own):
    """Keeps its count where nobody finds it."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        self.counts = [0]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.counts[0] += 1
        for group, parameter, gradient in self.each():
            parameter.sub_(gradient, alpha=group["lr"] / self.counts[0])


class StartsLate(Own):
    """Makes a tensor of each parameter's shape, a scalar and a word in its second step."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group, parameter, gradient in self.each():
            state = self.state[parameter]
            state["count"] = state.get("count", 0) + 1
            if state["count"] == 2:
                state |= {"sum": torch.zeros_like(parameter), "scale": torch.tensor(0.5), "word": "late"}
            if state["count"] >= 2:
                assert state["word"] == "late"
                state["sum"].mul_(0.9).add_(gradient)
                state["scale"] *= 0.9
                parameter.sub_(state["sum"], alpha=group["lr"] * float(state["scale"]))


class OtherShapeLate(Own):
    """Makes a tensor of another shape than its parameter's in its second step."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for _, parameter, _ in self.each():
            state = self.state[parameter]
            state["count"] = state.get("count", 0) + 1
            if state["count"] == 2:
                state["pair"] = torch.zeros(2)


class TwoModes(Own):
    """Schedule-free gradient descent (arXiv 2405.15682): trains at y = ¼ z + ¾ x, where x is to be used."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr, count=0, training=False)

    def train(self) -> None:
        self._switch(training=True, weight=0.25)

    def eval(self) -> None:
        self._switch(training=False, weight=1 - 1 / 0.75)

    @torch.no_grad()
    def _switch(self, *, training: bool, weight: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"] if group["training"] != training else ():
                if state := self.state[parameter]:
                    parameter.lerp_(state["z"], weight)
            group["training"] = training

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        assert all(group["training"] for group in self.param_groups)
        for group in self.param_groups:
            group["count"] += 1
        for group, parameter, gradient in self.each():
            z = self.state[parameter].setdefault("z", parameter.clone())
            average = parameter.lerp(z, 1 - 1 / 0.75)
            z.sub_(gradient, alpha=group["lr"])
            parameter.copy_(average.lerp_(z, 1 / group["count"]).lerp_(z, 0.25))


class Noisy(Own):
    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group, parameter, gradient in self.each():
            parameter.sub_(gradient, alpha=group["lr"] * float(torch.rand(())))


class LocalMomentum(Own):
    """Works on this rank's part of the parameters, and keeps plain tensors of its shape."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group, parameter, gradient in self.each():
            mine, of_mine = (getattr(it, "to_local", lambda it=it: it)() for it in (parameter, gradient))
            sum_ = self.state[parameter].setdefault("sum", torch.zeros_like(mine))
            sum_.mul_(0.9).add_(of_mine)
            mine.sub_(sum_, alpha=group["lr"])


class LocalRows(Own):
    """Works on this rank's part of the parameters, and keeps a factor of each of its rows in a list."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group, parameter, gradient in self.each():
            mine, of_mine = (getattr(it, "to_local", lambda it=it: it)() for it in (parameter, gradient))
            (rows,) = self.state[parameter].setdefault("rows", [torch.ones(len(mine))])
            rows += of_mine.reshape(len(rows), -1).norm(dim=1)
            mine.sub_((of_mine.reshape(len(rows), -1) / rows[:, None]).reshape(mine.shape), alpha=group["lr"])


class KeepsAFunction(Own):
    """Has a function in its parameter groups, as a schedule of its own."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr, schedule=lambda step: 1 / step)

    def step(self) -> None:  # type: ignore[override]
        return


class AveragesLate(Own):
    """Makes a tensor in its parameter groups in its second step."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            if group["count"] == 2:
                group["ema"] = torch.zeros(3)


class CountsLate(Own):
    """Makes a dict in its parameter groups in its second step."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if "count" in group:
                group["late"] = {"count": group["count"]}
            group["count"] = group.get("count", 0) + 1


class RoundsAtRandom(Own):
    """Draws from its own generator."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        self.noise = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group, parameter, gradient in self.each():
            parameter.sub_(gradient, alpha=group["lr"] * float(torch.rand((), generator=self.noise)))


class Compiles(Own):
    """Has torch choose a folder for compiled code, as the first step of torch's own optimizers does."""

    def step(self) -> None:  # type: ignore[override]
        cache_dir()


class PlainRows(Own):
    """Adds plain tensors to those of its parameters."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group, parameter, gradient in self.each():
            rows = self.state[parameter].setdefault("rows", torch.zeros(parameter.shape[0]))
            rows += gradient.reshape(len(rows), -1).norm(dim=1)
            parameter.sub_(gradient, alpha=group["lr"])
