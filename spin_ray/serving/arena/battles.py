"""Dataclasses of comparisons and votes."""

from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["a", "b"]
Verdict = Literal["a", "b", "tie", "both_bad"]

BATTLE_TTL_S = 3600.0
"""Seconds for which a comparison accepts a vote."""


@dataclass(frozen=True, slots=True)
class Question:
    messages: list[dict[str, Any]]
    sampling: dict[str, Any]

    def for_engine(self, model: str) -> dict[str, Any]:
        return {"messages": self.messages, **self.sampling, "n": 1, "stream": True, "model": model}


@dataclass(frozen=True, slots=True)
class Battle:
    id: str
    model_a: str
    model_b: str
    question: Question


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    finish_reason: str
    digest: str


@dataclass(frozen=True, slots=True)
class Vote:
    battle: str
    model_a: str
    model_b: str
    digest_a: str
    digest_b: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Tally:
    """The number of equal verdicts on two checkpoints."""

    a: tuple[str, str]
    """Name and digest."""
    b: tuple[str, str]
    verdict: Verdict
    count: int
