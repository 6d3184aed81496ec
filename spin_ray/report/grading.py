"""Grades of many responses, by a user's function on the workers, and checks of what it grades by."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import ray

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import name_of
from spin_ray.errors import StageError
from spin_ray.inputs.graders import (
    Graded,
    find_grader,
    graded,
    graded_part,
    graders_of,
    refuse_no_answer,
    refuse_no_pattern,
)
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.runtime.imports import raised_there, try_on_a_worker
from spin_ray.runtime.placement import in_the_cluster

ROWS_A_TASK = 256


def grade_all(
    grade: str, rows: Sequence[Graded], config: SpinConfig, setting: str = "evaluation.grade"
) -> list[float | None]:
    """Returns the grades in the order of ``rows``. An imported function runs in Ray tasks.

    Raises:
        DataError: the grader fails on a row, or gives no number from 0 to 1.
        StageError: a task died, or none ended for ``generation.shard_timeout_s``.
    """
    pieces = [rows[start : start + ROWS_A_TASK] for start in range(0, len(rows), ROWS_A_TASK)]
    if ":" not in grade or not ray.is_initialized():
        return [each for piece in pieces for each in _grade(grade, piece, setting)]
    task, found, limit_s = ray.remote(_grade).options(num_cpus=0.5), {}, config.generation.shard_timeout_s
    running = {task.remote(grade, piece, setting): number for number, piece in enumerate(pieces)}
    try:
        while running:
            if (ended := _first_ended(running, limit_s)) is None:
                left = [row for number in running.values() for _, _, row in pieces[number]]
                raise StageError(
                    f"{setting} {grade}: waited {limit_s:.0f} s (generation.shard_timeout_s) for the grades of "
                    f"{len(left)} rows, {left[0]} to {left[-1]}; {in_the_cluster()}; the grader hangs on one of them, "
                    "or half a CPU was never free; mend that and run the command again"
                )
            with raised_there(f"{setting} {grade}"):
                found[running.pop(ended)] = ray.get(ended, timeout=limit_s)
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)  # a grader that hangs would keep its CPU
    return [each for number in range(len(pieces)) for each in found[number]]


def _first_ended(running: Iterable[Any], limit_s: float) -> Any | None:
    ended, _ = ray.wait(list(running), timeout=limit_s)
    return ended[0] if ended else None


def _grade(grade: str, rows: Sequence[Graded], setting: str) -> list[float | None]:
    return [graded(grade, response, answer, row, setting) for response, answer, row in rows]


def answers_of(prompts: Artefact) -> dict[str, str]:
    """Returns the answers, as text, of the prompts that have one."""
    columns = ["prompt_id", "answer_text"]
    rows = (row for table in prompts.tables() for row in table.select(columns).to_pylist())
    return {row["prompt_id"]: row["answer_text"] for row in rows if row["answer_text"] is not None}


def check_answers(run: RunDir, config: SpinConfig) -> None:
    """Raises DataError if a grader finds no answer to grade by among the committed rows, or ``regex`` no pattern."""
    data = config.data
    parts = {
        "heldout": (run.heldout, data.heldout_from),
        "train": (run.prompts, data.train),
        "questions": (run.questions, data.questions),
    }
    for setting, grade in graders_of(config).items():
        prompts, given = parts[graded_part(setting)]
        if given is None:
            continue
        if grade == "regex":
            rows = (row for table in prompts.tables() for row in table.select(["messages", "answer_text"]).to_pylist())
            refuse_no_pattern(setting, ((_asked(row["messages"]), row["answer_text"]) for row in rows))
        answers = chain.from_iterable(table["answer_text"].to_pylist() for table in prompts.tables())
        refuse_no_answer(name_of(given), answers, grade, setting)


def _asked(messages: str) -> str:
    """Names a committed row, which does not keep its place, by its last question."""
    asked = [message["content"] for message in json.loads(messages) if message["role"] == "user"]
    return f"the row that asks {' '.join(asked[-1].split())[:_SHOWN]!r}" if asked else "a row without a question"


_SHOWN = 80
"""Most characters of a question in an error."""


def check_on_workers(graders: Mapping[str, str], limit_s: float, rows: Mapping[str, Graded] | None = None) -> None:
    """Imports each setting's grader on a worker, and grades the setting's row there.

    Args:
        limit_s: ``generation.start_timeout_s``.

    Raises:
        ConfigError: a worker cannot import one.
        DataError: one fails on its row, or gives no number from 0 to 1.
        StageError: a task died, or took longer than ``limit_s``.
    """
    for setting, grade in graders.items():
        arguments = (grade, setting, (rows or {}).get(setting))
        try_on_a_worker(_try_grader, arguments, f"{setting} {grade}", "import it and to grade a row", limit_s)


def _try_grader(grade: str, setting: str, row: Graded | None) -> None:
    find_grader(grade, setting)
    if row is not None:
        graded(grade, *row, setting)
