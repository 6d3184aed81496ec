"""Numbers in responses, for rows with a verifiable ``answer``."""

import re

MINUS = "-\N{MINUS SIGN}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{EN DASH}\N{SMALL HYPHEN-MINUS}\N{FULLWIDTH HYPHEN-MINUS}"
"""Characters that stand for a minus sign before a number."""
_MARKS = r"(?:[\s*_`~$€£¥₹]|\\(?:(?:boxed|fbox|text[a-z]*|math[a-z]*)\{|[(\[])?)*"
"""Blanks, currencies, and the marks of Markdown and TeX before a number."""
_SIGN = rf"([{MINUS}+]?)(?:(?<!\n.)[ ])?[*$€£¥₹\\]{{0,3}}"
"""A sign, and a blank behind it unless the sign begins a line, where it marks an item of a list."""
_SPACE = "\N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}"
_NUMBER = rf"(\d(?:[\d,]|\{{,\}}|\\,|[{_SPACE}](?=\d{{3}}(?!\d)))*(?:\.\d+)?)"
"""Digits, with thousands parted by commas, by TeX's ``{,}`` and ``\\,``, or by blanks that do not break."""
_EXTRACTORS = {
    name: re.compile(f".*{mark}{_MARKS}{_SIGN}{_NUMBER}", re.DOTALL)
    for name, mark in (("equals", "="), ("hashes", "####"))
}


def extract_number(text: str, extractor: str) -> float | None:
    """Returns the number after the last ``=`` (``equals``) or ``####`` (``hashes``) that has one, or None."""
    found = _EXTRACTORS[extractor].match(text)
    if not found:
        return None
    sign, digits = found.groups()
    number = float(re.sub(r"[^\d.]", "", digits))
    return -number if sign and sign in MINUS else number


def is_correct(text: str, answer: float, extractor: str) -> bool:
    """Compares the extracted number with ``answer``; the tolerance is 1e-6, relative if ``answer`` exceeds 1."""
    number = extract_number(text, extractor)
    return number is not None and abs(number - answer) <= 1e-6 * max(1.0, abs(answer))
