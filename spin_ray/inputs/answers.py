"""Numbers in responses and reference answers, for rows with a verifiable ``answer``."""

import math
import re
from typing import Any

MINUS = "-\N{MINUS SIGN}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{EN DASH}\N{SMALL HYPHEN-MINUS}\N{FULLWIDTH HYPHEN-MINUS}"
"""Characters that stand for a minus sign before a number."""
_MARKS = r"(?:[\s*_`~$€£¥₹]|\\(?:(?:boxed|fbox|text[a-z]*|math[a-z]*)\{|[(\[])?)*"
"""Blanks, currencies, and the marks of Markdown and TeX before a number."""
_SIGN = rf"([{MINUS}+]?)(?:(?<!\n.)[ ])?[*$€£¥₹\\]{{0,3}}"
"""A sign, and a blank behind it unless the sign begins a line, where it marks an item of a list."""
_SPACE = "\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}"
_DIGITS = rf"(?:\d(?:[\d,]|\{{,\}}|\\,|[{_SPACE}](?=\d{{3}}(?!\d)))*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
"""Digits, with thousands parted by commas, by TeX's ``{,}`` and ``\\,``, or by blanks that do not break."""
_NUMBER = rf"({_DIGITS})(?: ?/ ?(\d+(?:\.\d+)?))?"
"""A number, or a fraction of two."""
_PARTED = re.compile(r"(?:\d+|\d{1,3}(?:,\d{2,3})*,\d{3})?(?:\.\d+)?(?:[eE][-+]?\d+)?")
"""Digits whose commas part thousands, or India's lakhs: in ``1,5`` and ``1,2,3`` they do not."""
_WHOLE = re.compile(rf"{_MARKS}{_SIGN}{_NUMBER}(?:[\s*_`~$€£¥₹%.)\]}}]|\\[%)\]])*")
_TO_MINUS = str.maketrans(MINUS, "-" * len(MINUS))
_EXTRACTORS = {
    name: re.compile(f".*{mark}{_MARKS}{_SIGN}{_NUMBER}", re.DOTALL)
    for name, mark in (("equals", "="), ("hashes", "####"))
}


def extract_number(text: str, extractor: str) -> float | None:
    """Returns the number after the last ``=`` (``equals``) or ``####`` (``hashes``) that has one.

    Returns None if there is none, or if it is no number but a list or a decimal comma (``1,5``).
    """
    found = _EXTRACTORS[extractor].match(text)
    if not found:
        return None
    return _value(*found.groups())


def _value(sign: str, digits: str, divisor: str | None) -> float | None:
    plain = re.sub(rf"\{{,\}}|\\,|[{_SPACE}]", ",", digits).rstrip(",")
    divided_by = float(divisor or 1)
    if not _PARTED.fullmatch(plain) or not divided_by:
        return None
    number = float(plain.replace(",", "")) / divided_by
    return -number if sign and sign in MINUS else number


def answer_of(value: Any) -> float | None:
    """Returns ``value`` as a finite number, or None.

    A text is a number alone, in any form that ``extract_number`` reads, or ends with it behind ``####``.
    """
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        value = value.rpartition("####")[2].translate(_TO_MINUS)
        value = _value(*found.groups()) if (found := _WHOLE.fullmatch(value)) else value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def is_correct(text: str, answer: float, extractor: str) -> bool:
    """Compares the extracted number with ``answer``; the tolerance is 1e-6, relative if ``answer`` exceeds 1."""
    number = extract_number(text, extractor)
    return number is not None and abs(number - answer) <= 1e-6 * max(1.0, abs(answer))
