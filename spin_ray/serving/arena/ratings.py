"""Bradley-Terry ratings of votes, with bootstrap intervals, on the scale of chess. All functions are pure.

A checkpoint of strength s_i is preferred to one of strength s_j with probability s_i / (s_i + s_j). evalica finds the
strengths that make the votes most likely (Newman 2023, JMLR 24). Here

    rating = 1000 + 400 · (log10 s − mean of log10 s)    so    P(i preferred to j) = 1 / (1 + 10^((r_j − r_i) / 400))

A tie is half a win for each side, and so is "both bad", which says nothing about which of the two is better.

Every checkpoint has also drawn once with an imaginary anchor. Without the anchor a checkpoint that has only won would
be rated infinite, and two groups that never met could not be compared. With it the first vote sets two checkpoints 263
points apart; after a few dozen votes its influence is small.

Intervals are from the Bayesian bootstrap (Rubin 1981, Ann. Statist. 9): every game, the draws with the anchor too, gets
a random weight from Exp(1) and the ratings are found again. With many votes that agrees with drawing votes with
replacement. With three equal votes the interval is wide, where drawing votes would give one of width 0.
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
"""Name and digest: an iterate that was trained anew is another player."""


@dataclass(frozen=True, slots=True)
class Rating:
    """The rating of one checkpoint."""

    model: str
    digest: str
    rating: float
    low: float
    """Lower end of the interval that holds ``CONFIDENCE`` of the bootstrap's ratings; ``high`` is the upper end."""
    high: float
    wins: int
    losses: int
    ties: int
    """Ties, "both bad" among them."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """All votes between two checkpoints, whichever side they were on."""

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
    """Returns the rating of every checkpoint that was voted on, best first; the same for the same votes.

    Equal votes share a tally, and a sum of n weights from Exp(1) is Gamma(n): the cost does not grow with the votes.
    """
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
    """Returns the votes of each pair that met."""
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
    """Returns the ratings of ``players`` [P].

    ``weights`` [T + P] are those of the tallies, then of each player's draw with the anchor.
    """
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
    """Returns wins, losses and ties of each checkpoint."""
    scores = defaultdict(lambda: [0, 0, 0])
    for tally in tallies:
        a, b = {"a": (0, 1), "b": (1, 0)}.get(tally.verdict, (2, 2))
        scores[tally.a][a] += tally.count
        scores[tally.b][b] += tally.count
    return {player: (wins, losses, ties) for player, (wins, losses, ties) in scores.items()}
