"""Fakes for vLLM and for earlier stages."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import SamplingConfig
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.names import part_name
from spin_ray.run_dir.schemas import GENERATION_SCHEMA, PROMPT_SCHEMA
from spin_ray.runtime.engine import Completion, EngineSpec

END_OF_TURN = 2
MINIMAL = {"model": {"path": "m"}, "data": {"train": "d.jsonl"}}


def config_of(**sections: Any) -> SpinConfig:
    """Returns a config as stages get it, with its precision settled."""
    settled = {"train": {"precision": "bf16"} | sections.pop("train", {})}
    return SpinConfig.model_validate(MINIMAL | settled | sections)


class FakeEngine:
    """A ``GenerationEngine`` whose tokens follow from the seed alone.

    Every third response is cut at ``max_tokens``; with ``short`` each is two tokens and the end of the turn.
    """

    def __init__(
        self, vocabulary: int = 300, *, short: bool = False, before: Callable[[int], None] = lambda call: None
    ) -> None:
        """Makes an engine; ``before`` gets the number of each call, from 1, before its answers are made."""
        self._vocabulary, self._short, self._before = vocabulary, short, before
        self.calls: list[list[list[int]]] = []

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int], *, audited: int = 0
    ) -> list[Completion]:
        self.calls.append([list(prompt) for prompt in prompt_ids])
        self._before(len(self.calls))
        return [self._answer(sampling.max_tokens, seed) for _, seed in zip(prompt_ids, seeds, strict=True)]

    def close(self) -> None:
        pass

    def _answer(self, max_tokens: int, seed: int) -> Completion:
        if self._short:
            return Completion([3 + seed % 97, 3 + seed % 89, END_OF_TURN], "stop")
        random = np.random.default_rng(seed)
        if random.random() < 1 / 3:
            return Completion(random.integers(3, self._vocabulary, max_tokens).tolist(), "length")
        return Completion(
            [*random.integers(3, self._vocabulary, random.integers(0, max_tokens)).tolist(), END_OF_TURN], "stop"
        )


def seed_engine(_: EngineSpec) -> FakeEngine:
    return FakeEngine(short=True)


def write_rows(artefact: Artefact, schema: pa.Schema, rows: list[dict[str, Any]], part_rows: int) -> None:
    entries = {}
    for number, start in enumerate(range(0, len(rows), part_rows)):
        table = pa.Table.from_pylist(rows[start : start + part_rows], schema)
        entries[part_name(number)] = artefact.write_part(part_name(number), table)
    artefact.commit(entries, {}, {})


def exchange(number: int) -> str:
    """Returns one question and its answer, as in PROMPT_SCHEMA."""
    roles = (("user", "question"), ("assistant", "answer"))
    return json.dumps([{"role": role, "content": f"{word} {number}"} for role, word in roles])


def rows_of(artefact: Artefact) -> list[dict[str, Any]]:
    return [row for table in artefact.tables() for row in table.to_pylist()]


def write_prompts(artefact: Artefact, count: int, part_rows: int) -> None:
    """Commits prompts p000, p001, …; prompt i has the tokens [1, i] and the human response [10 + i, 2]."""
    rows = [
        {"prompt_id": f"p{i:03d}", "prompt_ids": [1, i], "real_ids": [10 + i, END_OF_TURN], "messages": exchange(i)}
        for i in range(count)
    ]
    write_rows(artefact, PROMPT_SCHEMA, rows, part_rows)


def generation_rows(answers: list[tuple[str, int, list[int]]], opponent: str = "sft") -> list[dict[str, Any]]:
    """Returns rows of GENERATION_SCHEMA from (prompt id, sample, tokens); a response without an end of turn was cut."""
    return [
        {
            "prompt_id": prompt_id,
            "sample": sample,
            "opponent": opponent,
            "token_ids": tokens,
            "finish_reason": "stop" if tokens and tokens[-1] == END_OF_TURN else "length",
            "seed": 0,
        }
        for prompt_id, sample, tokens in answers
    ]


def write_answers(artefact: Artefact, answers: list[tuple[str, int, list[int]]], part_rows: int) -> None:
    write_rows(artefact, GENERATION_SCHEMA, generation_rows(answers), part_rows)
