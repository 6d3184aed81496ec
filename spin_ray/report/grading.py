"""Grades of many responses, by a user's function on the workers."""

from collections.abc import Mapping, Sequence

import ray
import ray.exceptions

from spin_ray.errors import ConfigError, StageError, UserError, last_line
from spin_ray.inputs.graders import find_grader, graded
from spin_ray.run_dir.artefact import Artefact

ROWS_A_TASK = 256
Graded = tuple[str, str, str]
"""Response, answer and row id."""


def grade_all(grade: str, rows: Sequence[Graded], setting: str = "evaluation.grade") -> list[float | None]:
    """Returns the grades in the order of ``rows``. An imported function runs in Ray tasks.

    Raises:
        DataError: the grader fails on a row, or gives no number from 0 to 1.
        StageError: a task died.
    """
    pieces = [rows[start : start + ROWS_A_TASK] for start in range(0, len(rows), ROWS_A_TASK)]
    if ":" not in grade or not ray.is_initialized():
        return [each for piece in pieces for each in _grade(grade, piece, setting)]
    task = ray.remote(_grade).options(num_cpus=0.5)
    try:
        return [each for found in ray.get([task.remote(grade, piece, setting) for piece in pieces]) for each in found]
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise StageError(f"{setting} {grade}: {last_line(error)}") from error
    except ray.exceptions.RayError as error:
        raise StageError(f"{setting} {grade}: {last_line(error)}; run the command again") from error


def _grade(grade: str, rows: Sequence[Graded], setting: str) -> list[float | None]:
    return [graded(grade, response, answer, row, setting) for response, answer, row in rows]


def answers_of(prompts: Artefact) -> dict[str, str]:
    """Returns the answers, as text, of the prompts that have one."""
    columns = ["prompt_id", "answer_text"]
    tables = (table.select(columns) for table in prompts.tables() if columns[1] in table.column_names)
    rows = (row for table in tables for row in table.to_pylist())
    return {row["prompt_id"]: row["answer_text"] for row in rows if row["answer_text"] is not None}


def check_on_workers(graders: Mapping[str, str]) -> None:
    """Imports each setting's grader on a worker.

    Raises:
        ConfigError: a worker cannot import one.
        StageError: a task died.
    """
    task = ray.remote(_import_grader).options(num_cpus=0)
    for setting, grade in graders.items():
        try:
            ray.get(task.remote(grade, setting))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ConfigError):
                cure = "or give it to the job by --working-dir and --runtime-env-json (docs/data.md)"
                raise ConfigError(f"on the workers, {cause}, {cure}") from error
            raise StageError(f"{setting} {grade}: {last_line(error)}; run the command again") from error


def _import_grader(grade: str, setting: str) -> None:
    find_grader(grade, setting)
