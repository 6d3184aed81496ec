"""Comparisons of two iterates by a judge (``spin-ray judge``) and by voters (the arena)."""

import json
import sqlite3
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spin_ray.errors import first_line
from spin_ray.report.redaction import hide_in_text
from spin_ray.report.uncertainty import SHARE, interval_of_share, standard_error
from spin_ray.run_dir.names import VOTES, iterate_name, read_iterate
from spin_ray.run_dir.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Judged:
    one: str
    other: str
    win_rate: float | None
    """Share of ``one``'s wins; a tie counts as half."""
    standard_error: float | None
    number: int
    """Number of prompts judged or votes cast."""
    by: str
    draws: int | None = None
    """Number of their conversations; None: each is one."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Returns the 95 % interval; None if unknown."""
        if self.win_rate is None or self.standard_error is None:
            return None
        return interval_of_share(self.win_rate, self.standard_error, self.draws or self.number)


def judged_of(summary: dict[str, Any]) -> Judged:
    """Returns the comparison of which a judge's summary tells."""
    number = summary["wins"] + summary["ties"] + summary["losses"]
    by = hide_in_text(summary["judge"])
    one, other, rate, error = (summary[key] for key in ("one", "other", "win_rate", "standard_error"))
    return Judged(one, other, rate, error, number, by, summary["draws"])


def sentences(summary: dict[str, Any]) -> list[str]:
    """Returns what a judge's summary says, for people."""
    it = judged_of(summary)
    found = [
        f"{it.one} against {it.other}, judged by {it.by}: {summary['wins']} wins, {summary['ties']} ties, "
        f"{summary['losses']} losses on {it.number} prompts"
    ]
    if it.win_rate is not None:
        interval = f"; 95 % interval {it.interval[0]:.3f} to {it.interval[1]:.3f}" if it.interval else ""
        found.append(f"win rate {it.win_rate:.3f}, ties as half{interval}")
        found.append(f"both orders say the same on {summary['agreement']:.0%} of the prompts")
    if summary["position_bias"] is not None:
        found.append(f"position bias {summary['position_bias']:+.3f} (0: none, 0.5: the first always wins)")
    if summary["unclear"]:
        found.append(f"{summary['unclear']} more prompts have no clear verdict")
    return found


def read_judged(run: RunDir, unreadable: list[str]) -> list[Judged]:
    """Returns all comparisons, the judge's first; adds a sentence to ``unreadable`` for each damaged file."""
    return [*_judgements(run, unreadable), *_votes(run, unreadable)]


def _judgements(run: RunDir, unreadable: list[str]) -> list[Judged]:
    found = []
    for name in run.storage.entries("judgements"):
        if not name.endswith(".json"):
            continue
        try:
            found.append(judged_of(json.loads(run.storage.read(f"judgements/{name}"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            unreadable.append(f"judgements/{name} cannot be read ({hide_in_text(first_line(error))}).")
    return found


def _votes(run: RunDir, unreadable: list[str]) -> list[Judged]:
    """Reads the votes in the run's folder; those of another database are not looked for.

    Votes on a model of which newer weights have votes do not count: an iterate that was trained anew is another.
    """
    file = Path(run.storage.root) / VOTES
    if not isinstance(run.storage.root, Path) or not file.exists():
        return []
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
            votes = connection.execute(
                "SELECT model_a, digest_a, model_b, digest_b, verdict FROM battles WHERE verdict IS NOT NULL "
                "ORDER BY created"
            ).fetchall()
    except sqlite3.Error as error:
        unreadable.append(f"{VOTES} cannot be read ({error}).")
        return []
    newest: dict[str, str] = {}
    for a, digest_a, b, digest_b, _ in votes:
        newest |= {a: digest_a, b: digest_b}
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for a, digest_a, b, digest_b, verdict in votes:
        if (digest_a, digest_b) != (newest[a], newest[b]):
            continue
        newer, older = sorted((a, b), key=lambda name: (read_iterate(name) or 0, name), reverse=True)
        score = 0.5 if verdict not in ("a", "b") else float((a if verdict == "a" else b) == newer)
        scores[newer, older].append(score)
    return [
        Judged(_spelt(one), _spelt(other), float(np.mean(each)), standard_error(np.asarray(each), added=SHARE),
               len(each), "votes of the arena")
        for (one, other), each in sorted(scores.items())
    ]  # fmt: skip


def _spelt(model: str) -> str:
    """Returns the name on disk of an iterate of the API; other names unchanged."""
    number = read_iterate(model)
    return model if number is None else iterate_name(number)
