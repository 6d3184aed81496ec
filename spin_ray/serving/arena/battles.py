"""Comparisons and votes as values, and the names under which the sides of a comparison are asked."""

import re
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["a", "b"]
Verdict = Literal["a", "b", "tie", "both_bad"]

BATTLE_TTL_S = 3600.0
"""Seconds in which a comparison can be answered and voted on."""
_ALIAS = re.compile(r"battle-([0-9a-f]{24})-([ab])")


@dataclass(frozen=True, slots=True)
class Battle:
    """A comparison of two iterates; ``a`` and ``b`` are the names under which they can be asked blindly."""

    id: str
    seed: int
    """Seed of both sides, so that they differ by their weights and not by their luck."""
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
    """Question and answer of one side, as the server saw both."""

    messages: list[dict[str, Any]]
    sampling: dict[str, Any]
    """The request without model, messages and streaming: temperature, seed, max_tokens, …."""
    text: str
    finish_reason: str
    digest: str
    """Digest of the checkpoint that answered."""


@dataclass(frozen=True, slots=True)
class Vote:
    """A verdict, and the checkpoints that it reveals."""

    battle: str
    model_a: str
    model_b: str
    digest_a: str
    digest_b: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Tally:
    """Number of equal verdicts on two checkpoints, each on the same side."""

    a: tuple[str, str]
    """Name and digest."""
    b: tuple[str, str]
    verdict: Verdict
    count: int


def is_side(name: str) -> bool:
    """Tells whether a side of a comparison may be asked under ``name``."""
    return _ALIAS.fullmatch(name) is not None


def parse_alias(alias: str) -> tuple[str, Side]:
    """Splits ``battle-<id>-a`` into ``(id, "a")``.

    Raises:
        LookupError: ``alias`` names no side of a comparison.
    """
    match = _ALIAS.fullmatch(alias)
    if match is None:
        raise LookupError(alias)
    battle, side = match.groups()
    return battle, "a" if side == "a" else "b"
