"""Self-reinforcement (Tong et al. 2024, arXiv 2405.04086): preferences from questions alone."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import SelfFilterConfig
from spin_ray.inputs.answers import extract_number
from spin_ray.inputs.rendering import tokenizer_of
from spin_ray.loop.algorithms.base import Algorithm, Turn
from spin_ray.loop.stages import pairs
from spin_ray.loop.stages.generation.shards import Job
from spin_ray.run_dir.artefact import Artefact, digests
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA

Row = dict[str, Any]
Choose = Callable[[list[list[Row]]], Iterable[int | str]]
"""Function that returns the number of each question's chosen sample, or the reason why there is none."""


class SelfReinforcement(Algorithm):
    """DPO of an answer by θ_t, chosen by agreement or grade, against an answer by the start model."""

    needs = ("sft", "data.questions")
    reads = ("self_filter",)

    def problems(self, config: SpinConfig) -> Iterator[str]:
        chosen, default = config.self_filter, SelfFilterConfig()
        if chosen and chosen.grade and "min_agreement" in chosen.model_fields_set:
            yield "self_filter.min_agreement: self_filter.grade chooses in its place; leave it out"
        elif chosen and chosen.min_agreement != default.min_agreement and config.generation.samples_per_prompt == 1:
            yield "self_filter.min_agreement: one sample agrees with itself; raise generation.samples_per_prompt"
        if chosen and not chosen.grade and chosen.min_grade != default.min_grade:
            yield "self_filter.min_grade: needs self_filter.grade"

    def plays(self, run: RunDir) -> Artefact:
        return run.questions

    def make_pairs(self, turn: Turn) -> None:
        run, config, start = turn.run, turn.config, turn.start.model
        base_answers = run.artefact("start/answers")
        turn.play(start, [Job(run.questions, base_answers, start, samples=1)])
        generations = run.generations(turn.iteration)
        inputs = digests(run.questions, generations, base_answers)
        chosen = config.self_filter
        settings: dict[str, Any] = {
            "min_agreement": chosen.min_agreement if chosen else 0,
            "extractor": config.evaluation.answer_extractor,
        }
        if chosen and chosen.grade:
            settings = {"grade": chosen.grade, "min_grade": chosen.min_grade}
        dropped = Counter[str]()
        tables = _tables(turn, base_answers, dropped)
        pairs.make(run, config, turn.iteration, pairs.Fresh(tables, inputs, settings, dropped=dropped))


def _tables(turn: Turn, base_answers: Artefact, dropped: Counter[str]) -> Iterator[pa.Table]:
    against = {
        row["prompt_id"]: row["token_ids"]
        for table in base_answers.tables()
        for row in table.to_pylist()
        if row["sample"] == 0
    }
    chosen = turn.config.self_filter
    choose = _by_grade(turn, chosen) if chosen and chosen.grade else _by_agreement(turn)
    for played in pairs.joined(turn.run.questions, turn.run.generations(turn.iteration), turn.iteration):
        rows = []
        groups = [list(group) for _, group in groupby(played.to_pylist(), key=lambda row: row["prompt_id"])]
        for samples, found in zip(groups, choose(groups), strict=True):
            if isinstance(found, str):
                dropped[found] += 1
                continue
            row = samples[found]
            rows.append(row | {"real_ids": row["generated_ids"], "generated_ids": against[row["prompt_id"]]})
        yield pa.Table.from_pylist(rows, PAIR_SCHEMA)


def _by_agreement(turn: Turn) -> Choose:
    read, chosen = _reader(turn), turn.config.self_filter
    needed = chosen.min_agreement if chosen else 0

    def choose(groups: list[list[Row]]) -> Iterator[int | str]:
        for samples in groups:
            agreed, share = commonest([read(row["generated_ids"]) for row in samples])
            yield agreed if share and share >= needed else "disagreed" if share else "no_answer"

    return choose


def _by_grade(turn: Turn, chosen: SelfFilterConfig) -> Choose:
    from spin_ray.report.grading import answers_of, grade_all

    answers, ends = answers_of(turn.run.questions), _ends(turn)
    tokenizer = tokenizer_of(turn.opponent.whole.path, turn.config.model)
    grade, decode = str(chosen.grade), tokenizer.decode

    def choose(groups: list[list[Row]]) -> Iterator[int | str]:
        asked = [
            (number, place, row)
            for number, samples in enumerate(groups)
            for place, row in enumerate(samples)
            if row["prompt_id"] in answers and row["generated_ids"][-1:] and row["generated_ids"][-1] in ends
        ]
        rows = [
            (decode(row["generated_ids"], skip_special_tokens=True), answers[row["prompt_id"]], row["prompt_id"])
            for _, _, row in asked
        ]
        found = grade_all(grade, rows, turn.config, "self_filter.grade")
        best: dict[int, tuple[float, int]] = {}
        for (number, place, _), each in zip(asked, found, strict=True):
            if each is not None:
                best[number] = max(best.get(number, (each, -place)), (each, -place))
        for number in range(len(groups)):
            top = best.get(number)
            yield "no_answer" if top is None else -top[1] if top[0] >= chosen.min_grade else "below_grade"

    return choose


def commonest(answers: list[Any]) -> tuple[int, float]:
    """Returns the number of the first sample with the commonest answer, and the share of samples with it."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0, 0.0
    answer, count = counts.most_common(1)[0]
    return answers.index(answer), count / len(answers)


def _reader(turn: Turn) -> Callable[[list[int]], Any]:
    """Returns a function that reads a response's answer: a number, or all tokens.

    A cut response has no answer, so that the model does not learn to stop early.
    """
    extractor, ends = turn.config.evaluation.answer_extractor, _ends(turn)
    tokenizer = tokenizer_of(turn.opponent.whole.path, turn.config.model)

    def read(token_ids: list[int]) -> Any:
        if not token_ids or token_ids[-1] not in ends:
            return None
        if extractor == "none":
            return tuple(token_ids)
        return extract_number(tokenizer.decode(token_ids, skip_special_tokens=True), extractor)

    return read


def _ends(turn: Turn) -> set[int]:
    return {turn.start.end_of_turn_id, *turn.start.other_ends}
