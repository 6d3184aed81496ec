"""A config of another trainer, read as facts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spin_ray.errors import ConfigError
from spin_ray.loop.init.foreign_tools import LLAMA_FACTORY, Tool
from spin_ray.loop.init.settings import Setting, Settings


@dataclass
class Foreign:
    """A foreign config. A fact is one of its values, under a name that is the same for all tools."""

    file: Path
    tool: Tool
    method: str
    """``sft`` or ``dpo``."""
    gpus: int
    """GPUs of the foreign run. The global batch depends on them, but no config names them."""
    given: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Key and value in the config, by fact."""
    settings: Settings = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """Keys that are not carried over, with the reason."""
    asked: set[str] = field(default_factory=set)
    """Facts that ``fact`` has looked up."""

    @property
    def output(self) -> str | None:
        return self.given["output"][1] if "output" in self.given else None

    @property
    def starts_below_its_adapter(self) -> bool:
        """True if DPO's reference is the model without the adapter that the training starts from: LLaMA-Factory's."""
        own = self.fact("new_adapter") or "ref_model" in self.left
        return self.method == "dpo" and self.tool is LLAMA_FACTORY and not own

    @property
    def stage(self) -> str:
        """Section of the recipe for the foreign training."""
        return "sft" if self.method == "sft" else "train"

    @property
    def batch_place(self) -> str:
        return "sft.global_batch_rows" if self.method == "sft" else "train.global_batch_pairs"

    @property
    def packs(self) -> bool:
        """True if a row of the foreign batch is a pack of several rows."""
        return self.method == "sft" and bool(self.fact("packing") or self.fact("neat_packing"))

    @property
    def max_steps(self) -> int:
        """Limit to the training's steps; 0: none."""
        return max(0, self.read("max_steps", lambda count: int(count or 0)))

    @property
    def warmup_steps(self) -> float:
        """Steps of the learning rate's warm-up; below 1 a fraction of all steps."""
        return self.read("warmup_steps", lambda count: float(count or 0))

    def fact(self, name: str) -> Any:
        """Returns the config's value, else the tool's default, else None."""
        self.asked.add(name)
        if name in self.given:
            return self.given[name][1]
        own = self.tool.sft if self.method == "sft" else self.tool.dpo
        return own.get(name, self.tool.defaults.get(name))

    def why(self, *names: str) -> str:
        keys = [self.given[name][0] for name in names if name in self.given]
        return f"{' × '.join(keys)} of {self.file.name}" if keys else f"{self.tool.name}'s default"

    def put(self, place: str, name: str, read: Callable[[Any], Any] = lambda value: value) -> None:
        """Carries a fact over, if there is one. ``read`` returns None for a value without an equal here."""
        value = self.fact(name)
        if value is None:
            return
        found = self.read(name, read)
        if found is None:
            self.leave(name, "has no equal here")
        else:
            self.settings[place] = Setting(found, self.why(name))

    def read(self, name: str, read: Callable[[Any], Any]) -> Any:
        """Returns ``read`` of a fact; raises ConfigError if ``read`` fails."""
        value = self.fact(name)
        try:
            return read(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.file}: {self.given[name][0]} is {value!r}, which is no such value") from error

    def reason(self, name: str) -> str:
        """Returns why a fact is not carried over; empty if it is, or is not given."""
        return self.left.get(self.given[name][0], "") if name in self.given else ""

    def leave(self, name: str, reason: str) -> None:
        if name in self.given:
            self.left[self.given[name][0]] = reason
