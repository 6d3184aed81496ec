"""Self-reinforcement (Tong et al. 2024, arXiv 2405.04086): preferences from questions alone."""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.answers import extract_number
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.learner.step import Objective
from spin_ray.loop.algorithms.base import Algorithm, Turn, margin_objective
from spin_ray.loop.stages import pairs
from spin_ray.loop.stages.generation.shards import Job
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA


class SelfReinforcement(Algorithm):
    """θ_t's answer against the start model's, where enough samples of θ_t agree. The loss is DPO's."""

    needs = ("sft", "data.questions")
    reads = ("self_filter",)

    def plays(self, run: RunDir) -> Artefact:
        return run.questions

    def make_pairs(self, turn: Turn) -> None:
        run, config, start = turn.run, turn.config, turn.start.model
        base_answers = run.artefact("start/answers")
        turn.play(start, [Job(run.questions, base_answers, start.name, start.digest)])
        generations = run.generations(turn.iteration)
        inputs = {name.path: name.manifest().digest for name in (run.questions, generations, base_answers)}
        chosen = config.self_filter
        settings = {
            "min_agreement": chosen.min_agreement if chosen else 0,
            "extractor": config.evaluation.answer_extractor,
        }
        dropped = Counter[str]()
        tables = _tables(turn, base_answers, dropped)
        pairs.make(run, config, turn.iteration, pairs.Fresh(tables, inputs, settings, dropped=dropped))

    def objective(self, config: SpinConfig, iteration: int) -> Objective:
        return margin_objective(config, iteration)


def _tables(turn: Turn, base_answers: Artefact, dropped: Counter[str]) -> Iterator[pa.Table]:
    against = {
        row["prompt_id"]: row["token_ids"]
        for table in base_answers.tables()
        for row in table.to_pylist()
        if row["sample"] == 0
    }
    read = _reader(turn)
    chosen = turn.config.self_filter
    for played in pairs.joined(turn.run.questions, turn.run.generations(turn.iteration), turn.iteration):
        rows = []
        for prompt_id, group in groupby(played.to_pylist(), key=lambda row: row["prompt_id"]):
            samples = list(group)
            agreed, share = commonest([read(row["generated_ids"]) for row in samples])
            if share == 0 or share < (chosen.min_agreement if chosen else 0):
                dropped["disagreed" if share else "no_answer"] += 1
                continue
            row = samples[agreed]
            rows.append(row | {"real_ids": row["generated_ids"], "generated_ids": against[prompt_id]})
        yield pa.Table.from_pylist(rows, PAIR_SCHEMA)


def commonest(answers: list[Any]) -> tuple[int, float]:
    """Returns the first sample with the commonest answer, and the share that agrees."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return 0, 0.0
    answer, count = counts.most_common(1)[0]
    return answers.index(answer), count / len(answers)


def _reader(turn: Turn) -> Callable[[list[int]], Any]:
    """Returns a function from a response to its answer: a number, or without extractor its tokens.

    Cut responses have none, so that nobody learns to stop there.
    """
    extractor, ends = turn.config.evaluation.answer_extractor, {turn.start.end_of_turn_id, *turn.start.other_ends}
    tokenizer = load_tokenizer(str(turn.opponent.path), trust_remote_code=turn.config.model.trust_remote_code)

    def read(token_ids: list[int]) -> Any:
        if not token_ids or token_ids[-1] not in ends:
            return None
        if extractor == "none":
            return tuple(token_ids)
        return extract_number(tokenizer.decode(token_ids, skip_special_tokens=True), extractor)

    return read
