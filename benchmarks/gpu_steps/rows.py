"""Rows of results/gpu.json, and the page made of them."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    id: str
    value: float | None
    """None: not measured; ``note`` says why."""
    unit: str
    target: str = ""
    """``>= 1.5`` or ``<= 0.7``; empty: no target."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Returns None without a target."""
        if not self.target:
            return None
        sign, limit = self.target.split()
        return self.value is not None and (self.value >= float(limit) if sign == ">=" else self.value <= float(limit))


@dataclass
class Results:
    """The file of rows, one for each step, id and card.

    It is written after every change: a run that is cut short keeps its rows.
    """

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    """``card``, ``versions`` and ``commit`` of added rows."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.folder / "gpu.json"
        self.rows: list[dict[str, Any]] = json.loads(self._file.read_text())["rows"] if self._file.exists() else []

    @property
    def of_this_card(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("card") == self.facts.get("card")]

    def forget(self, step: str, items: Iterable[str]) -> None:
        """Drops the rows of this card's items."""
        gone = {(step, item, self.facts.get("card")) for item in items}
        self.rows = [row for row in self.rows if (row["step"], row["item"], row.get("card")) not in gone]

    def add(self, step: str, item: str, measure: Measure) -> None:
        row = {"step": step, "item": item} | asdict(measure) | {"met": measure.met}
        row |= {"measured": date.today().isoformat()} | self.facts
        key = (step, measure.id, row.get("card"))
        self.rows = [*(kept for kept in self.rows if (kept["step"], kept["id"], kept.get("card")) != key), row]
        written = self._file.with_suffix(".new")
        written.write_text(json.dumps({"rows": self.rows}, indent=1) + "\n")
        written.replace(self._file)  # whole at any time: a step may read it
        (self.folder / "gpu.md").write_text(page(self.rows))


def values_of(file: Path, step: str, facts: dict[str, Any]) -> dict[str, float | None]:
    """Returns the values of a step by id, of rows with the card, versions and commit of ``facts`` alone."""
    rows = json.loads(file.read_text())["rows"]
    return {row["id"]: row["value"] for row in rows if row["step"] == step and facts.items() <= row.items()}


def line(step: str, measure: Measure) -> str:
    value = "–" if measure.value is None else f"{measure.value:.4g}"
    met = {None: "", True: f"  [{measure.target}: met]", False: f"  [{measure.target}: MISSED]"}[measure.met]
    return f"{step:>9} | {measure.id}: {value} {measure.unit}{met}{f'  ({measure.note})' if measure.note else ''}"


def page(rows: list[dict[str, Any]]) -> str:
    text = ["# What ran on a GPU", "", "Made by `make gpu-bench`; every row is in gpu.json with its versions.", ""]
    for step in dict.fromkeys(row["step"] for row in rows):
        text += [f"## {step}", "", "| row | value | unit | target | met | card | measured | commit | note |"]
        text += ["|---|---|---|---|---|---|---|---|---|"]
        text += [_table_line(row) for row in rows if row["step"] == step]
        text += [""]
    return "\n".join(text)


def _table_line(row: dict[str, Any]) -> str:
    met = {None: "", True: "yes", False: "**no**"}[row["met"]]
    value = "–" if row["value"] is None else f"{row['value']:.4g}"
    note = row["note"].replace("|", "/")
    cells = (row["id"], value, row["unit"], row["target"], met, row["card"], row["measured"], row["commit"], note)
    return f"| {' | '.join(cells)} |"
