"""Comparisons and votes as values."""

import re
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["a", "b"]
Verdict = Literal["a", "b", "tie", "both_bad"]

BATTLE_TTL_S = 3600.0
"""Seconds in which a comparison can be voted on."""
_ALIAS = re.compile(r"battle-([0-9a-f]{24})-([ab])")


@dataclass(frozen=True, slots=True)
class Battle:
    """A comparison of two iterates; ``a`` and ``b`` are their blind names."""

    id: str
    seed: int
    model_a: str
    model_b: str

    @property
    def a(self) -> str:
        return f"battle-{self.id}-a"

    @property
    def b(self) -> str:
        return f"battle-{self.id}-b"


@dataclass(frozen=True, slots=True)
class Answer:
    messages: list[dict[str, Any]]
    sampling: dict[str, Any]
    """Sampling fields of the request."""
    text: str
    finish_reason: str
    digest: str


@dataclass(frozen=True, slots=True)
class Vote:
    """A verdict and the checkpoints that it reveals."""

    battle: str
    model_a: str
    model_b: str
    digest_a: str
    digest_b: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Tally:
    """Number of equal verdicts on two checkpoints."""

    a: tuple[str, str]
    """Name and digest."""
    b: tuple[str, str]
    verdict: Verdict
    count: int


def is_side(name: str) -> bool:
    return _ALIAS.fullmatch(name) is not None


def parse_alias(alias: str) -> tuple[str, Side]:
    """Splits ``battle-<id>-a`` into ``(id, "a")``.

    Raises:
        LookupError: ``alias`` names no side.
    """
    match = _ALIAS.fullmatch(alias)
    if match is None:
        raise LookupError(alias)
    battle, side = match.groups()
    return battle, "a" if side == "a" else "b"
