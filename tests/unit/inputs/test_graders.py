"""Grades of responses, by hand."""

import signal
import time

import pytest

from spin_ray.config.sections import DataConfig
from spin_ray.errors import ConfigError, DataError
from spin_ray.inputs import graders
from spin_ray.inputs.files import SourceRow
from spin_ray.inputs.graders import answer_text, find_grader, graded, regex


def half_right(response: str, answer: str) -> float | None:
    """Stands for a user's function."""
    return {"ok": 0.5, "skip": None, "much": 2.0}[answer]


@pytest.mark.parametrize(
    ("grade", "response", "answer", "expected"),
    [
        ("exact", " Paris\n", "Paris", 1), ("exact", "Paris.", "Paris", 0), ("exact", "true", "true", 1),
        ("regex", "in 1998 or so", r"\b199\d\b", 1), ("regex", "in 2001", r"\b199\d\b", 0),
        ("multiple_choice", "Not A. The answer is (B).", "B", 1), ("multiple_choice", "b", "B", 0),
        ("multiple_choice", "Answer: c", "(C)", 1), ("multiple_choice", "C) because A is wrong", "C", 1),
        ("multiple_choice", r"So \boxed{D}", "D", 1), ("multiple_choice", "A dog runs", "A", 0),
        ("multiple_choice", "B", "Paris", None), ("multiple_choice", "The answer is a hard one\nB", "B", 1),
        ("multiple_choice", "The answer is option B", "B", 1), ("multiple_choice", "the answer is $B$", "B", 1),
        ("multiple_choice", "The answer, I think, is B.", "B", 1), ("multiple_choice", "My answer: option (b)", "B", 1),
        ("multiple_choice", "the answer I think is B", "I", 0), ("multiple_choice", r"the answer is \(B\)", "B", 1),
        ("multiple_choice", "The answer is not B", "B", 0), ("multiple_choice", "The answer is Because", "B", 0),
        ("multiple_choice", r"The answer is A? No, the answer is $\boxed{\textbf{B}}$", "B", 1),
        ("multiple_choice", r"The answer is A? No, the answer is $\boxed{B}$", "A", 0),
        ("multiple_choice", r"\boxed{Dog}", "D", 0), ("multiple_choice", "**B**", "B", 1),
        ("multiple_choice", "Option B is wrong", "B", 0), ("multiple_choice", "The correct option is B", "B", 1),
        ("number", "so x = 6, y = −5", "-5", 1), ("number", "so x = 6, y = −5", "6", 0), ("number", "= 5", "−5", 0),
        ("json", 'Here:\n```json\n{"b": 1, "a": [true]}\n```', '{"a": [true], "b": 1}', 1),
        ("number", "2 = 3, so #### 4", "4", 1), ("number", "It is = 1,234", "1234", 1), ("number", "4", "4", 0),
        ("number", "= 4", "four", None),
        ("json", "12.0", "12", 1),
        ("json", '{"total": 12}', answer_text({"total": 12.0}), 1),
        ("json", "12.5", "12", 0),
        ("json", "1", "true", 0), ("json", "no JSON", "1", 0), ("json", "1", "{", None),
        (f"{__name__}:half_right", "x", "ok", 0.5), (f"{__name__}:half_right", "x", "skip", None),
    ],
)  # fmt: skip
def test_each_grader_on_right_wrong_and_unusable_answers(grade, response, answer, expected):
    assert graded(grade, response, answer, "r1") == expected


def test_a_failing_function_is_one_line_with_its_name_and_the_row():
    with pytest.raises(DataError, match=r"half_right: failed on the held-out row r1 \(KeyError: 'other'\)"):
        graded(f"{__name__}:half_right", "x", "other", "r1")
    with pytest.raises(DataError, match=r"gave 2.0 for the held-out row r1; expected 0 to 1"):
        graded(f"{__name__}:half_right", "x", "much", "r1")
    with pytest.raises(DataError, match=r"regex: failed on the held-out row r1 .*'\(' is no pattern"):
        graded("regex", "x", "(", "r1")


def test_a_response_that_would_be_searched_for_hours_is_wrong(monkeypatch):
    """None would leave the accuracy's denominator, which degenerate responses would raise so."""
    monkeypatch.setattr(graders, "REGEX_S", 0.05)
    assert graded("regex", "a" * 40 + "b", "(a+)+$", "r1") == 0
    assert graded("regex", "aa", "(a+)+$", "r1") == 1


@pytest.mark.parametrize(
    "text", ["answer ", "answer is \n", "( ", r"\boxed{", "\n( ", "answer, ", r"answer \text{", "a:"]
)
def test_a_degenerate_choice_takes_no_time(text):
    """Two ways to read one mark took time that doubled with each mark."""
    before = time.process_time()
    graded("multiple_choice", text * 4000, "B", "r1")
    graded("multiple_choice", "answer" + text[-1] * 20_000, "B", "r1")
    assert time.process_time() - before < 1


def test_the_limit_is_cpu_time_and_leaves_other_timers_alone():
    with graders._at_most(0.02):
        time.sleep(0.1)  # another program has the machine
    before = signal.signal(signal.SIGVTALRM, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1000, 7)
    try:
        regex("aa", "a+")
        assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_IGN
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == pytest.approx((1000, 7), rel=0.01)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def test_an_answer_that_is_no_pattern_is_told_at_the_start():
    graders.refuse_no_pattern("evaluation.grade", [("h:1", "a+"), ("h:2", None), ("h:3", 12)])
    with pytest.raises(DataError, match=r"h:4: answer 'f\(' is no pattern .*scorer\.path is regex"):
        graders.refuse_no_pattern("scorer.path", [("h:4", "f(")])


def one_argument(response):
    return 1.0


class Grades:
    def __init__(self, response, answer):
        pass


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("one_argument", r"is not called with a response and an answer \(too many positional arguments\)"),
        ("Grades", "is no function of a response and an answer"),
    ],
)
def test_what_cannot_grade_is_told_before_anything_runs(name, said):
    with pytest.raises(ConfigError, match=f"^self_filter.grade: {__name__}:{name} {said}"):
        find_grader(f"{__name__}:{name}", "self_filter.grade")


@pytest.mark.parametrize(("found", "shown"), [("yes", "'yes'"), ((1.0, "ok"), r"\(1.0, 'ok'\)"), (5, "5")])
def test_a_grade_that_is_no_number_from_0_to_1_is_shown(monkeypatch, found, shown):
    monkeypatch.setitem(graders.GRADERS, "mine", lambda response, answer: found)
    with pytest.raises(DataError, match=f"^scorer.path mine: gave {shown} for the row r1; expected 0 to 1, or None$"):
        graded("mine", "x", "y", "r1", "scorer.path")


def test_a_grader_is_tried_on_the_first_row_with_an_answer():
    contents = [None, {"prompt": "1", "response": "a"}, {"prompt": "2", "response": "b", "answer": 12.0}]
    rows = [SourceRow(f"h:{number}", content, b"") for number, content in enumerate(contents)]
    assert graders.first_graded(rows, DataConfig(train="d")) == ("b", "12", "h:2")
    assert graders.first_graded(rows[:2], DataConfig(train="d")) is None


def test_a_grader_that_is_not_there_is_named_before_anything_runs():
    with pytest.raises(ConfigError, match=r"evaluation.grade: no_such_module:f cannot be imported"):
        find_grader("no_such_module:f")


def test_answers_keep_their_own_words():
    assert [answer_text(value) for value in (None, "1,234", True, 12, 12.0, 1.5, {"a": 1})] == [
        None, "1,234", "true", "12", "12", "1.5", '{"a": 1}',
    ]  # fmt: skip
