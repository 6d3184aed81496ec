"""Graders, which compare a response with its row's ``answer``."""

import inspect
import json
import math
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import DataConfig
from spin_ray.errors import ConfigError, DataError, first_line
from spin_ray.inputs.answers import answer_of, extract_number, is_correct
from spin_ray.inputs.conversations import Unusable, read_row
from spin_ray.inputs.files import SourceRow
from spin_ray.learner.import_path import import_object

Grader = Callable[[str, str], float | None]
"""Function from a response and its row's answer to a grade from 0 to 1; None if the answer cannot be graded."""
Graded = tuple[str, str, str]
"""Response, answer, and the row's id or place."""
GradedPart = Literal["heldout", "train", "questions"]

_TEX = r"\\(?:(?:boxed|fbox|text[a-z]*|math[a-z]*)\{)?"
_BEFORE = rf"""(?:[\s:*_$(\["'`]|{_TEX}){{0,200}}"""
"""Blanks, and the marks of Markdown and TeX before a letter. Without a limit, degenerate responses take minutes."""
_BEFORE_IN_LINE = _BEFORE.replace(r"\s", r" \t")
_OPTION = r"""(?:(?i:(?:the\s)?(?:correct\s)?(?:option|choice|letter)\b)[\s:*_$(\["'`\\]{0,8})?"""
_LETTER = r"[A-Z](?![^\W_])"
_NO_PRONOUN = r"(?!'\w|\s(?:think|believe|guess|suppose|would|am)\b)"
_ASIDE = r"(?:\s?,[^,.;:\n]{1,40},|\s?\([^()\n]{1,40}\)|\s(?:choice|option|letter|here|to\s[a-z0-9 ]{1,40}?))?"
"""Words between ``answer`` and ``is``, as in: the answer, I think, is B."""
_ANSWER = rf"answer(?:{_ASIDE}\s{{0,4}}(?:(?<=\s)(?:is|would\sbe|must\sbe)|:))?"
_CORRECT = r"\b(?:correct|right|best)\s(?:option|choice)\sis"
_SAID = re.compile(rf"(?i:{_ANSWER}|{_CORRECT}){_BEFORE}{_OPTION}({_LETTER}{_NO_PRONOUN}|[a-z](?=\W*$))", re.MULTILINE)
_BOXED = re.compile(rf"\\boxed\{{{_BEFORE}{_OPTION}({_LETTER})")
_ALONE = re.compile(rf"""^{_BEFORE_IN_LINE}{_OPTION}({_LETTER})(?:[ \t*_$)\]}}"'`.\\]*$|[).:])""", re.MULTILINE)
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def exact(response: str, answer: str) -> float | None:
    """Compares both texts without surrounding blanks."""
    return float(response.strip() == answer.strip())


def regex(response: str, answer: str) -> float | None:
    """Searches the response for the pattern ``answer``; gives up with 0 after ``REGEX_S``.

    Raises:
        ValueError: ``answer`` is no pattern.
    """
    try:
        with _at_most(REGEX_S):
            return float(re.search(answer, response) is not None)
    except TimeoutError:
        return 0.0  # None would take the response out of the accuracy
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{answer!r} is no pattern ({error})") from error


REGEX_S = 2.0
"""Most CPU seconds for one response; patterns such as ``(a+)+$`` may take hours."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after ``seconds`` of CPU time; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGVTALRM, stop)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)


def refuse_no_pattern(setting: str, rows: Iterable[tuple[str, Any]]) -> None:
    """Raises DataError if an answer in ``rows`` (place, answer) is no pattern, by which ``setting`` grades."""
    known = set[str]()
    for place, answer in rows:
        text = answer_text(answer) or ""
        if text in known:
            continue
        known.add(text)
        try:
            regex("", text)
        except ValueError as error:
            raise DataError(f"{place}: answer {error}, and {setting} is regex; mend the pattern") from None


def multiple_choice(response: str, answer: str) -> float | None:
    """Compares letters: the last ``answer is B``, else the last boxed letter, else the last line ``B`` or ``B) …``."""
    wanted = re.fullmatch(r"\W*([A-Za-z])\W*", answer)
    if not wanted:
        return None
    said = next((found for form in (_SAID, _BOXED, _ALONE) if (found := form.findall(response))), [])
    return float(bool(said) and said[-1].upper() == wanted.group(1).upper())


def json_value(response: str, answer: str) -> float | None:
    """Compares JSON values; a code fence may hold the response's."""
    try:
        wanted = _loaded(answer)
    except ValueError:
        return None
    fenced = _FENCED.findall(response)
    try:
        found = _loaded(fenced[-1] if fenced else response)
    except (ValueError, RecursionError):
        return 0.0
    return float(_canonical(found) == _canonical(wanted))


def _loaded(text: str) -> Any:
    """Reads JSON, where 12.0 is the number 12."""
    return json.loads(text, parse_float=lambda digits: int(it) if (it := float(digits)).is_integer() else it)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def number(response: str, answer: str) -> float | None:
    """Compares the number after the last ``####``, else after the last ``=``."""
    wanted = answer_of(answer)
    found = next((how for how in ("hashes", "equals") if extract_number(response, how) is not None), None)
    return None if wanted is None else float(found is not None and is_correct(response, wanted, found))


GRADERS: dict[str, Grader] = {
    "number": number, "exact": exact, "regex": regex, "multiple_choice": multiple_choice, "json": json_value,
}  # fmt: skip
"""Graders by name. ``evaluation.grade: number`` means the recipe's ``answer_extractor`` instead."""


def graders_of(config: SpinConfig) -> dict[str, str]:
    """Returns the recipe's graders by setting."""
    named: dict[str, str | None] = {}
    if config.evaluation.grade != "number":
        named["evaluation.grade"] = config.evaluation.grade
    elif config.evaluation.answer_extractor != "none" and config.data.questions is None:  # else it is for those
        named["evaluation.answer_extractor"] = "number"
    if config.self_filter is not None:
        named["self_filter.grade"] = config.self_filter.grade
    if config.scorer is not None and config.scorer.kind == "grade":
        named["scorer.path"] = config.scorer.path
    return {setting: grade for setting, grade in named.items() if grade is not None}


def graded_part(setting: str) -> GradedPart:
    """Returns the part of the data whose answers a setting's grader reads."""
    parts: dict[str, GradedPart] = {"evaluation": "heldout", "scorer": "train", "self_filter": "questions"}
    return parts[setting.partition(".")[0]]


def find_grader(grade: str, setting: str = "evaluation.grade") -> Grader:
    """Returns the grader of a name or import path ``my_pkg.mine:function``.

    Raises:
        ConfigError: there is none.
    """
    if grade in GRADERS:
        return GRADERS[grade]
    found = import_object(grade, setting, GRADERS)
    if isinstance(found, type) or not callable(found):
        raise ConfigError(f"{setting}: {grade} is no function of a response and an answer")
    try:
        inspect.signature(found).bind("response", "answer")
    except TypeError as error:
        raise ConfigError(f"{setting}: {grade} is not called with a response and an answer ({error})") from error
    except ValueError:  # some functions in C tell no signature
        pass
    return found


def first_graded(rows: Iterable[SourceRow], data: DataConfig) -> Graded | None:
    """Returns response, answer and place of the first row that has an answer, if any."""
    for row in rows:
        try:
            found = read_row(row.content, data)
        except Unusable:
            continue
        if (answer := answer_text(found.row.get("answer"))) is not None:
            return found.ending_with_real[-1][-1]["content"], answer, row.origin
    return None


def refuse_no_answer(source: str, answers: Iterable[str | None], grade: str, setting: str) -> None:
    """Raises DataError if there is no answer in ``answers`` by which the grader can grade."""
    grader = GRADERS.get(grade) if grade != "regex" else None  # a user's function and regex take any answer
    if not any(answer is not None and (grader is None or grader("", answer) is not None) for answer in answers):
        raise DataError(
            f"{source}: no row has an answer that {setting} {grade} can grade by; add a column answer, or name the "
            "column that holds it: data.columns: {answer: NAME}"
        )


def graded(grade: str, response: str, answer: str, row: str, setting: str = "evaluation.grade") -> float | None:
    """Returns the grade of one response.

    Raises:
        DataError: the grader fails on the row, or gives no number from 0 to 1.
    """
    grader = find_grader(grade, setting)
    where = f"held-out row {row}" if setting == "evaluation.grade" else f"row {row}"
    try:
        found = grader(response, answer)
    except Exception as error:  # a user's function may raise anything
        said = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{setting} {grade}: failed on the {where} ({said})") from error
    try:
        number = None if found is None else float(found)
    except Exception:  # a user's class may raise anything
        number = math.nan
    if number is not None and not 0 <= number <= 1:
        shown = repr(found).split("\n")[0][:_SHOWN]
        raise DataError(f"{setting} {grade}: gave {shown} for the {where}; expected 0 to 1, or None")
    return number


_SHOWN = 80
"""Most characters of a wrong grade in an error."""


def answer_text(value: Any) -> str | None:
    """Returns an answer as text; other values become JSON, e.g. ``true``, ``12``, ``{"a": 1}``.

    Tables may hold 12 as 12.0; both become ``12``.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
