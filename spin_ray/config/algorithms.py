"""The algorithms by name, with the facts about them that stand outside their classes: rows, recipe and reports ask."""

from dataclasses import dataclass
from typing import Literal

AlgorithmName = Literal["spin", "continued_sft", "dpo", "sppo", "self_reinforcement", "seft", "tspin", "sdft"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts about one algorithm. The defaults are for one from outside, of which nothing is known."""

    rejected: bool = False
    """True if each row of ``data.train`` must have a ``rejected`` response."""
    takes_tools: bool = True
    """True if rows with tools can be used."""
    plays_questions: bool = False
    """True if ``data.questions``, where given, are its prompts."""
    reads_numbers: bool = False
    """True if it reads the numbers in answers, by ``evaluation.answer_extractor``."""
    pairs: Literal["one", "each sample"] | None = None
    """The most pairs of a prompt; None if unknown."""
    learns_loss: bool = False
    """True if it trains with ``objective.loss``."""
    beta_scales_margins: bool = True
    """False if β is no scale of margins, which are then reported as they are."""


_FACTS: dict[str, Facts] = {
    "spin": Facts(pairs="each sample", learns_loss=True),
    "continued_sft": Facts(pairs="one"),
    "dpo": Facts(pairs="one", rejected=True, learns_loss=True),
    "sppo": Facts(pairs="one", beta_scales_margins=False),
    "self_reinforcement": Facts(pairs="one", plays_questions=True, reads_numbers=True, learns_loss=True),
    "seft": Facts(pairs="each sample", plays_questions=True, takes_tools=False),
    "tspin": Facts(pairs="each sample"),
    "sdft": Facts(pairs="each sample", takes_tools=False),
}


def facts_of(algorithm: str) -> Facts:
    """Returns the facts about the algorithm with a name or import path."""
    return _FACTS.get(algorithm, Facts())
