"""Prints results/bench.json: what was measured beside what was aimed at.

python benchmarks/table.py
"""

import json
import re

from harness import RESULTS
from rich.console import Console
from rich.table import Table


def main() -> None:
    table = Table(title="results/bench.json: median of runs, beside its target")
    for name in ("question", "result", "target", "met", "lowest to highest", "runs", "measured", "commit"):
        table.add_column(name, justify="right" if name in ("result", "runs") else "left")
    rows = json.loads((RESULTS / "bench.json").read_text())["rows"]
    for row in sorted(rows, key=lambda row: (int((re.match(r"\d+", row["id"]) or ["999"])[0]), row["id"])):
        spread = " to ".join(f"{value:g}" for value in row["spread"])
        met = "yes" if row["met"] else "[bold red]NO"
        shown = (row["id"], f"{row['value']:g}", row["target"], met, spread, str(row["runs"]))
        table.add_row(*shown, row["measured"], row["commit"])
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
