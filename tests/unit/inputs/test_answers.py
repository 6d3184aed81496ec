"""Numbers in responses."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spin_ray.inputs.answers import answer_of, extract_number, is_correct


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 * 8 = 16", 16.0),
        ("2 * 8 = 16 and 16 + 1 = 17.", 17.0),
        ("first = 3,\nthen = 1,200.50", 1200.5),
        ("cost = $ 1,200", 1200.0),
        ("= -4", -4.0),
        ("a=7b", 7.0),
        ("x = 5 = y", 5.0),
        ("x = y", None),
        ("the answer is 16", None),
        ("so x = 6, y = −5", -5.0),  # U+2212
        ("x = 6, y = – 5", -5.0),
        ("x = 6 =\n- 7 apples", 6.0),  # an item of a list
        ("= 3–5", 3.0),
        ("= **4**", 4.0),
        (r"= -\$1,200", -1200.0),
        (r"= $\boxed{-4}$", -4.0),
        (r"= 1{,}234\,\text{m}", 1234.0),
        ("= 1\u202f234\u202f567 12", 1234567.0),
        ("y = 2, x = (3)", 2.0),
        ("y = 2, x = {3, 4}", 2.0),
        (r"y = 2, x = \sqrt{3}", 2.0),
        ("= ", None),
        ("=", None),
        ("", None),
        ("= .5", 0.5),
        ("y = 2, x = 1,5", None),  # a decimal comma, or a list
        ("= 3,14159", None),
        ("= 1,2,3", None),
        ("= 18, 19", 18.0),
        ("= 18,", 18.0),
        ("= 1,00,000 rupees", 100000.0),
        ("= 3/4", 0.75),
        ("= 12 / 4 = 3", 3.0),
        ("= 3/0", None),
        ("= 1.5e3", 1500.0),
        ("= 1e-05", 1e-5),
        ("= 2e", 2.0),
        ("#### 16", None),
    ],
)
def test_equals_takes_the_number_after_the_last_equals_sign_that_has_one(text, number):
    assert extract_number(text, "equals") == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is\n#### 1,200", 1200.0),
        ("#### 1 then #### 2", 2.0),
        ("####7", 7.0),
        ("#### $-3.5", -3.5),
        ("### 7", None),
        ("2 * 8 = 16", None),
        ("#### none", None),
        ("#### **−4**", -4.0),
    ],
)
def test_hashes_takes_the_number_after_the_last_four_hashes_that_have_one(text, number):
    assert extract_number(text, "hashes") == number


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (12, 12.0), (" 12.5 ", 12.5), ("1e-05", 1e-5), ("so 2 + 2 = 4\n#### 4", 4.0), ("1,234,567.5", 1234567.5),
        ("#### $18", 18.0), ("#### 12%", 12.0), ("#### **18**", 18.0), ("#### 1{,}234", 1234.0), (r"#### \$18", 18.0),
        (r"$\boxed{-4}$", -4.0), (r"\(18\)", 18.0), ("−5", -5.0), ("3/4", 0.75), ("18.", 18.0),
        ("#### 18 apples", None),
        ("1,5", None), ("#### 3 or 4", None), ("3/0", None), ("B", None), ("", None), (True, None), (None, None),
        ("nan", None), ("9" * 400, None), ([1], None),
    ],
)  # fmt: skip
def test_a_reference_is_read_as_responses_are(answer, number):
    assert answer_of(answer) == number
    if isinstance(answer, str) and number is not None:
        told = answer.rpartition("####")[2]
        assert extract_number(f"so #### {told}", "hashes") == extract_number(f"so = {told}", "equals") == number


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        ("= 16", 16.0, True),
        ("= 16.0", 16.0, True),
        ("= 17", 16.0, False),
        ("= 0.3333333", 1 / 3, True),  # off by 3e-8
        ("= 0.33", 1 / 3, False),
        ("= 1000001", 1_000_000.0, True),  # 1e-6 relative
        ("= 1000002", 1_000_000.0, False),
        ("= 0", 0.0, True),
        ("= " + "9" * 400, 1.0, False),
        ("sixteen", 16.0, False),
    ],
)
def test_a_response_is_correct_when_its_number_is_the_answer(text, answer, correct):
    assert is_correct(text, answer, "equals") is correct


@given(st.integers(-(10**9), 10**9), st.text("abc \n.,$=#", max_size=20))
def test_any_number_is_found_whatever_stands_before_it(number, before):
    assert extract_number(f"{before}= {number}", "equals") == number
    assert extract_number(f"{before}#### {number:,}", "hashes") == number


@pytest.mark.parametrize(
    "text", ["=" + " " * 20_000, "= $" * 5000, "=1," * 5000 + "x", "=" + r"\text{" * 5000, "=\\" * 9000, "#" * 20_000]
)
def test_a_degenerate_response_takes_no_time(text):
    """Two blanks-or-nothing in a row made it quadratic: 7 s of processor for 20,000 blanks."""
    before = time.process_time()
    extract_number(text, "equals")
    extract_number(text, "hashes")
    assert time.process_time() - before < 1
