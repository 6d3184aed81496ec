"""Bradley-Terry ratings of votes, with bootstrap intervals, on the scale of chess.

P(i preferred to j) = s_i / (s_i + s_j). evalica finds the most likely strengths s (Newman 2023, JMLR 24). Then

    rating = 1000 + 400 · (log10 s − mean of log10 s)

A tie or "both bad" is half a win for each side. Every checkpoint also gets one draw with an imaginary anchor; without
it, a checkpoint that always won would be rated infinite.

Intervals come from the Bayesian bootstrap (Rubin 1981, Ann. Statist. 9): each game and each draw with the anchor gets
a weight from Exp(1). Resampling would give three equal votes an interval of width 0.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import evalica
import numpy as np
import pandas as pd
from evalica import Winner

from spin_ray.serving.arena.battles import Tally

MEAN = 1000.0
SCALE = 400.0
RESAMPLES = 300
CONFIDENCE = 0.95
_WINNERS = {"a": Winner.X, "b": Winner.Y, "tie": Winner.Draw, "both_bad": Winner.Draw}

Checkpoint = tuple[str, str]
"""Name and digest: a retrained iterate is another player."""


@dataclass(frozen=True, slots=True)
class Rating:
    """The rating of one checkpoint."""

    model: str
    digest: str
    rating: float
    low: float
    """Lower end of the ``CONFIDENCE`` interval."""
    high: float
    wins: int
    losses: int
    ties: int
    """Ties and "both bad"."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """All votes between two checkpoints."""

    a: str
    a_digest: str
    b: str
    b_digest: str
    a_wins: int
    b_wins: int
    ties: int
    both_bad: int


@lru_cache(maxsize=8)
def rate(tallies: tuple[Tally, ...]) -> list[Rating]:
    """Returns the ratings, best first. A tally of n votes draws Gamma(n), the sum of n weights from Exp(1)."""
    if not tallies:
        return []
    players = sorted({player for tally in tallies for player in (tally.a, tally.b)})
    games = np.array([tally.count for tally in tallies] + [1] * len(players))
    weights = np.random.default_rng(0).gamma(games, size=(RESAMPLES, len(games)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile([_ratings(tallies, players, drawn) for drawn in weights], [tail, 100 - tail], axis=0)
    point, scores = _ratings(tallies, players, games), _scores(tallies)
    rated = []
    for i, player in enumerate(players):
        middle, least, most = (round(float(value), 1) for value in (point[i], low[i], high[i]))
        wins, losses, ties = scores[player]
        rated.append(Rating(*player, middle, least, most, wins, losses, ties))
    return sorted(rated, key=lambda rating: -rating.rating)


def pairings(tallies: Sequence[Tally]) -> list[Pairing]:
    found: dict[tuple[Checkpoint, Checkpoint], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for tally in tallies:
        turned = tally.b < tally.a
        pair = (tally.b, tally.a) if turned else (tally.a, tally.b)
        verdict = {"a": "b", "b": "a"}.get(tally.verdict, tally.verdict) if turned else tally.verdict
        found[pair][verdict] += tally.count
    return [
        Pairing(*a, *b, a_wins=votes["a"], b_wins=votes["b"], ties=votes["tie"], both_bad=votes["both_bad"])
        for (a, b), votes in sorted(found.items())
    ]


def _ratings(tallies: Sequence[Tally], players: list[Checkpoint], weights: np.ndarray) -> np.ndarray:
    """Returns ratings [P]. ``weights`` [T + P] belong to the tallies, then to the draws with the anchor."""
    number = {player: i for i, player in enumerate(players)}
    anchor = len(players)
    strengths = evalica.bradley_terry(
        xs=[number[tally.a] for tally in tallies] + list(range(anchor)),
        ys=[number[tally.b] for tally in tallies] + [anchor] * anchor,
        winners=[_WINNERS[tally.verdict] for tally in tallies] + [Winner.Draw] * anchor,
        weights=weights,
        index=pd.RangeIndex(anchor + 1),
        tolerance=1e-8,
        limit=10_000,
    ).scores
    logs = np.log10([strengths[i] for i in range(anchor)])
    return MEAN + SCALE * (logs - logs.mean())


def _scores(tallies: Sequence[Tally]) -> dict[Checkpoint, tuple[int, int, int]]:
    scores = defaultdict(lambda: [0, 0, 0])
    for tally in tallies:
        a, b = {"a": (0, 1), "b": (1, 0)}.get(tally.verdict, (2, 2))
        scores[tally.a][a] += tally.count
        scores[tally.b][b] += tally.count
    return {player: (wins, losses, ties) for player, (wins, losses, ties) in scores.items()}
