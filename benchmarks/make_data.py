"""Writes rows for the benchmarks: small talk between people, from the PyPI package chitchat-dataset.

    python benchmarks/make_data.py runs/bench/chitchat.jsonl [--rows 2200]

Benchmarks take other rows as well: ``--data FILE.jsonl`` with ``messages``.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from spin_ray.inputs.embedded.data import chitchat_conversations

ROLES = ("user", "assistant", "user", "assistant")
LONGEST = 60
"""Most words of a message: packs of 512 tokens must hold any row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=2200)
    options = parser.parse_args()
    rows = list(islice(exchanges(), options.rows))
    if len(rows) < options.rows:
        parser.error(f"--rows: {options.rows} are wanted, the package has {len(rows)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{options.out}: {len(rows)} rows")


def exchanges() -> Iterator[dict[str, Any]]:
    """Yields the first four turns of each conversation as a row of ``messages``."""
    for conversation in chitchat_conversations().values():
        texts = [" ".join(message["text"] for message in turn) for turn in conversation["messages"][: len(ROLES)]]
        if len(texts) == len(ROLES) and all(0 < len(text.split()) <= LONGEST for text in texts):
            yield {"messages": [{"role": role, "content": text} for role, text in zip(ROLES, texts, strict=True)]}


if __name__ == "__main__":
    main()
