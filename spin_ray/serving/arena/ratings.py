"""Bradley-Terry ratings of votes, with intervals, on the scale of chess.

P(i preferred to j) = s_i / (s_i + s_j). evalica finds the most likely strengths s (Newman 2023, JMLR 24). Then

    rating = 1000 + 400 · (log10 s − mean of log10 s)

A tie or "both bad" is half a win for each side. Every checkpoint also has half a win and half a loss against an
imaginary anchor; without them, a checkpoint that always won would be rated infinite.

Intervals come from draws in which every win gets a weight from Exp(1), and every half win one from Gamma(1/2): the
Bayesian bootstrap (Rubin 1981, Ann. Statist. 9). The two halves of a tie, and those of the anchor, are weighted apart,
so that few votes give wide intervals. Against one opponent of known strength, W wins and L losses give the posterior
Beta(W + 1/2, L + 1/2) of Jeffreys' prior.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import evalica
import numpy as np
import pandas as pd
from evalica import Winner

from spin_ray.serving.arena.battles import Tally

MEAN = 1000.0
SCALE = 400.0
DRAWS = 1000
CONFIDENCE = 0.95
APART = 1 - (1 - CONFIDENCE) / 2
"""Share of the draws from which on one of two checkpoints counts as better than the other."""
_ANCHOR = 0.5
"""Wins, and losses, of each checkpoint against the anchor."""
_POINTS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.5, 0.5), "both_bad": (0.5, 0.5)}

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
    above_next: float | None
    """Share of the draws in which it is above the next checkpoint of the ranking; None for the last."""


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
    a_above: float
    """Share of the draws in which ``a`` is above ``b``."""


class Leaders(NamedTuple):
    ratings: list[Rating]
    """Best first."""
    pairs: list[Pairing]
    """Pairs with votes."""


@lru_cache(maxsize=8)
def lead(tallies: tuple[Tally, ...]) -> Leaders:
    """Rates the checkpoints, and says of neighbours and of pairs how often one is above the other."""
    if not tallies:
        return Leaders([], [])
    players = sorted({player for tally in tallies for player in (tally.a, tally.b)})
    wins = _wins(tallies, players)
    generator = np.random.default_rng(0)
    draws = np.array([_ratings(generator.gamma(wins)) for _ in range(DRAWS)])
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, [tail, 100 - tail], axis=0)
    point, scores = _ratings(wins), _scores(tallies)
    ranking = [int(i) for i in np.argsort(-point, kind="stable")]
    rated = []
    for i, following in zip(ranking, [*ranking[1:], None], strict=True):
        middle, least, most = (round(float(value), 1) for value in (point[i], low[i], high[i]))
        above = None if following is None else _above(draws, i, following)
        rated.append(Rating(*players[i], middle, least, most, *scores[players[i]], above))
    return Leaders(rated, _pairings(tallies, players, draws))


def _pairings(tallies: Sequence[Tally], players: list[Checkpoint], draws: np.ndarray) -> list[Pairing]:
    found: dict[tuple[Checkpoint, Checkpoint], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for tally in tallies:
        turned = tally.b < tally.a
        pair = (tally.b, tally.a) if turned else (tally.a, tally.b)
        verdict = {"a": "b", "b": "a"}.get(tally.verdict, tally.verdict) if turned else tally.verdict
        found[pair][verdict] += tally.count
    return [
        Pairing(
            *a, *b, a_wins=votes["a"], b_wins=votes["b"], ties=votes["tie"], both_bad=votes["both_bad"],
            a_above=_above(draws, players.index(a), players.index(b)),
        )
        for (a, b), votes in sorted(found.items())
    ]  # fmt: skip


def _above(draws: np.ndarray, i: int, j: int) -> float:
    return float((draws[:, i] > draws[:, j]).mean())


def _wins(tallies: Sequence[Tally], players: list[Checkpoint]) -> np.ndarray:
    """Returns the wins [P + 1, P + 1] of each row's player over each column's; the last is the anchor."""
    number = {player: i for i, player in enumerate(players)}
    wins = np.zeros((len(players) + 1,) * 2)
    wins[-1, :-1] = wins[:-1, -1] = _ANCHOR
    for tally in tallies:
        a, b = number[tally.a], number[tally.b]
        for_a, for_b = _POINTS[tally.verdict]
        wins[a, b] += for_a * tally.count
        wins[b, a] += for_b * tally.count
    return wins


def _ratings(wins: np.ndarray) -> np.ndarray:
    """Returns the ratings [P] that are most likely with the (weighted) wins."""
    winners, losers = np.nonzero(wins)
    strengths = evalica.bradley_terry(
        xs=winners.tolist(),
        ys=losers.tolist(),
        winners=[Winner.X] * len(winners),
        weights=wins[winners, losers],
        index=pd.RangeIndex(len(wins)),
        tolerance=1e-8,
        limit=10_000,
    ).scores
    logs = np.log10([strengths[i] for i in range(len(wins) - 1)])
    return MEAN + SCALE * (logs - logs.mean())


def _scores(tallies: Sequence[Tally]) -> dict[Checkpoint, tuple[int, int, int]]:
    scores = defaultdict(lambda: [0, 0, 0])
    for tally in tallies:
        a, b = {"a": (0, 1), "b": (1, 0)}.get(tally.verdict, (2, 2))
        scores[tally.a][a] += tally.count
        scores[tally.b][b] += tally.count
    return {player: (wins, losses, ties) for player, (wins, losses, ties) in scores.items()}
