"""Numbers in responses, for rows with a verifiable ``answer``."""

import re

_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
_EXTRACTORS = {
    "equals": re.compile(rf".*=\s*(?:\$\s*)?({_NUMBER})", re.DOTALL),
    "hashes": re.compile(rf".*####\s*(?:\$\s*)?({_NUMBER})", re.DOTALL),
}


def extract_number(text: str, extractor: str) -> float | None:
    """Returns the number after the last ``=`` (``equals``) or ``####`` (``hashes``) that has one, or None."""
    found = _EXTRACTORS[extractor].match(text)
    return float(found.group(1).replace(",", "")) if found else None


def is_correct(text: str, answer: float, extractor: str) -> bool:
    """Compares the extracted number with ``answer``; the tolerance is 1e-6, relative if ``answer`` exceeds 1."""
    number = extract_number(text, extractor)
    return number is not None and abs(number - answer) <= 1e-6 * max(1.0, abs(answer))
