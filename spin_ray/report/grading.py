"""Grades of many responses, by a user's function on the workers."""

from collections.abc import Sequence

import ray
import ray.exceptions

from spin_ray.errors import StageError, UserError, last_line
from spin_ray.inputs.graders import graded

ROWS_A_TASK = 256
Graded = tuple[str, str, str]
"""Response, answer, and the id of the row."""


def grade_all(grade: str, rows: Sequence[Graded]) -> list[float | None]:
    """Returns the grades in the order of ``rows``; Ray tasks call an imported function.

    Raises:
        DataError: the grader fails on a row, or gives no number from 0 to 1.
        StageError: a task died.
    """
    pieces = [rows[start : start + ROWS_A_TASK] for start in range(0, len(rows), ROWS_A_TASK)]
    if ":" not in grade or not ray.is_initialized():
        return [each for piece in pieces for each in _grade(grade, piece)]
    task = ray.remote(_grade).options(num_cpus=0.5)
    try:
        return [each for found in ray.get([task.remote(grade, piece) for piece in pieces]) for each in found]
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise StageError(f"evaluation.grade {grade}: {last_line(error)}") from error
    except ray.exceptions.RayError as error:
        raise StageError(f"evaluation.grade {grade}: {last_line(error)}; run the command again") from error


def _grade(grade: str, rows: Sequence[Graded]) -> list[float | None]:
    return [graded(grade, response, answer, row) for response, answer, row in rows]
