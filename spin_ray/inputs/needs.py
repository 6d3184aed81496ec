"""Needs of the algorithms: what the rows of their data must have."""

from dataclasses import dataclass
from typing import Literal

from spin_ray.config.recipe import SpinConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RowNeeds:
    """Needs of one algorithm. The defaults are for one from outside, of which nothing is known."""

    rejected: bool = False
    """True if each row of ``data.train`` must have a ``rejected`` response."""
    takes_tools: bool = True
    """True if rows with tools can be used."""
    plays_questions: bool = False
    """True if ``data.questions``, where given, are its prompts."""
    pairs: Literal["one", "each sample"] | None = None
    """The most pairs of a prompt; None if unknown."""


_NEEDS = {
    "spin": RowNeeds(pairs="each sample"),
    "continued_sft": RowNeeds(pairs="one"),
    "dpo": RowNeeds(pairs="one", rejected=True),
    "sppo": RowNeeds(pairs="one"),
    "self_reinforcement": RowNeeds(pairs="one", plays_questions=True),
    "seft": RowNeeds(pairs="each sample", plays_questions=True, takes_tools=False),
    "tspin": RowNeeds(pairs="each sample"),
    "sdft": RowNeeds(pairs="each sample", takes_tools=False),
}


def needs_of(config: SpinConfig) -> RowNeeds:
    return _NEEDS.get(config.algorithm, RowNeeds())


def most_pairs(config: SpinConfig) -> int | None:
    """Returns the most pairs that a prompt gives, if it is known."""
    return {"one": 1, "each sample": config.generation.samples_per_prompt, None: None}[needs_of(config).pairs]
