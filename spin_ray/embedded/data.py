"""Two small data sets: generated sums and conversations between people.

A row has the shape that recipes expect of SFT data: ``{"messages": [..., {"role": "assistant", ...}]}``, for sums also
``"answer"``. Which rows are taken is decided by a digest, never by a random generator, so everyone gets the same.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]
"""Example: ``{"messages": [{"role": "user", "content": "17 + 25 = ?"},
{"role": "assistant", "content": "17 + 25 = 42"}], "answer": 42}``."""

Split = Literal["train", "heldout"]

ARITHMETIC_ROWS: dict[Split, int] = {"train": 512, "heldout": 64}


def write_jsonl(path: Path, rows: list[Row]) -> None:
    """Write one JSON object a line, ASCII, in the order given."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def arithmetic_rows(split: Split) -> list[Row]:
    """Synthetic, generated sums of two numbers below 100: 512 rows to train on, 64 held out.

    No pair of numbers is in both splits, nor is its mirror image: ``17 + 25`` in one keeps ``25 + 17`` out of the other.
    """
    pairs = sorted(((a, b) for a in range(100) for b in range(a, 100)), key=lambda pair: _rank(f"{pair[0]}+{pair[1]}"))
    start = 0 if split == "train" else ARITHMETIC_ROWS["train"]
    return [_sum_row(a, b) for a, b in pairs[start : start + ARITHMETIC_ROWS[split]]]


def _sum_row(smaller: int, larger: int) -> Row:
    mirrored = int(_rank(f"order {smaller}+{larger}"), 16) % 2
    a, b = (larger, smaller) if mirrored else (smaller, larger)
    return {"messages": _turns(f"{a} + {b} = ?", f"{a} + {b} = {a + b}"), "answer": a + b}


def _turns(*contents: str) -> list[dict[str, str]]:
    """Messages of alternating speakers, the user first: ``_turns("hi", "hello")``."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _rank(key: str) -> str:
    """A fixed pseudo-random order: sort by this."""
    return hashlib.sha256(key.encode()).hexdigest()
