"""Bradley-Terry ratings: known answers, an independent solver, and the votes that break plain maximum likelihood."""

import math
from itertools import pairwise

import evalica
import numpy as np
import pytest
from evalica import Winner
from scipy.optimize import minimize
from scipy.stats import binom

from spin_ray.serving.arena.battles import Tally
from spin_ray.serving.arena.ratings import APART, Pairing, Rating, lead

SFT, ZERO, ONE = ("sft", "s"), ("iter-0", "z"), ("iter-1", "o")


def rate(tallies: tuple[Tally, ...]) -> list[Rating]:
    return lead(tallies).ratings


def rated(*tallies: Tally) -> dict[str, float]:
    return {rating.model: rating.rating for rating in rate(tallies)}


def test_three_of_four_votes_are_a_log_odds_of_ln_3():
    """30,000 of 40,000: 400·log10(3) = 190.85 points apart; the draws with the anchor are lost among so many."""
    ratings = rated(Tally(SFT, ZERO, "a", 10_000), Tally(SFT, ZERO, "b", 30_000))
    log_odds = (ratings["iter-0"] - ratings["sft"]) * math.log(10) / 400
    assert log_odds == pytest.approx(math.log(3), abs=1e-3)
    assert sum(ratings.values()) == pytest.approx(2000)


def test_few_votes_are_rated_as_the_likelihood_with_its_anchor_says():
    """The same maximum as a general optimiser finds; the anchor, with whom each has drawn, is at 0."""
    votes = [(SFT, ZERO, 10, 30), (ZERO, ONE, 4, 1), (SFT, ONE, 2, 2)]
    players = [SFT, ZERO, ONE]

    def log_loss(x: np.ndarray) -> float:
        def p(difference: float) -> float:
            return np.logaddexp(0, -difference)

        games = sum(
            a_wins * p(x[players.index(a)] - x[players.index(b)])
            + b_wins * p(x[players.index(b)] - x[players.index(a)])
            for a, b, a_wins, b_wins in votes
        )
        return games + sum(0.5 * p(s) + 0.5 * p(-s) for s in x)

    expected = minimize(log_loss, np.zeros(3), tol=1e-12).x * 400 / math.log(10)
    ratings = rated(*[Tally(a, b, verdict, n) for a, b, *wins in votes for verdict, n in zip("ab", wins, strict=True)])
    assert [ratings[name] for name, _ in players] == pytest.approx(expected - expected.mean() + 1000, abs=0.1)


@pytest.mark.parametrize("verdict", ["tie", "both_bad"])
def test_undecided_votes_are_half_a_win_for_each_side(verdict):
    """10 wins and 20 undecided of 40, so 20 of 40 points for either: level."""
    ratings = rated(Tally(SFT, ZERO, "a", 10), Tally(SFT, ZERO, verdict, 20), Tally(SFT, ZERO, "b", 10))
    assert ratings["sft"] == pytest.approx(ratings["iter-0"], abs=0.1)


def test_sides_do_not_matter():
    one_way = rated(Tally(SFT, ZERO, "a", 7), Tally(SFT, ZERO, "b", 3))
    both_ways = rated(Tally(SFT, ZERO, "a", 4), Tally(ZERO, SFT, "b", 3), Tally(ZERO, SFT, "a", 3))
    assert both_ways == pytest.approx(one_way, abs=0.1)


def test_a_checkpoint_that_only_won_has_a_finite_rating_and_a_wide_interval():
    """Plain maximum likelihood has no answer here (evalica gives both the same strength)."""
    best, worst = rate((Tally(SFT, ZERO, "b", 3),))
    assert (best.model, best.wins, worst.losses) == ("iter-0", 3, 3)
    assert 1100 < best.rating < 1300 and best.high - best.low > 600


def width(*tallies: Tally) -> float:
    best, *_ = rate(tallies)
    return best.high - best.low


@pytest.mark.parametrize("verdict", ["a", "tie", "both_bad"])
def test_one_vote_tells_nobody_apart(verdict):
    """Either interval holds the other's rating."""
    best, worst = rate((Tally(SFT, ZERO, verdict, 1),))
    assert worst.high > best.rating > worst.low and best.high > worst.rating > best.low
    assert best.high - best.low > 700
    assert best.above_next is not None and best.above_next < APART and worst.above_next is None


@pytest.mark.parametrize("verdict", ["tie", "both_bad"])
def test_intervals_of_undecided_votes_shrink_as_those_of_votes_do(verdict):
    """As 1/√n: four times the votes halve them; the anchor adds to the first."""
    widths = [width(Tally(SFT, ZERO, verdict, count)) for count in (5, 20, 80, 320)]
    assert widths[0] > 250
    ratios = [one / other for one, other in pairwise(widths)]
    assert ratios == pytest.approx([2, 2, 2], rel=0.25), ratios


def shares_apart(players: list[tuple[str, str]], strengths: list[float], votes: int, runs: int) -> float:
    """Simulates ``runs`` boards of ``votes`` votes; returns the share of pairs that are told apart."""
    generator, apart, pairs = np.random.default_rng(1), 0, 0
    meetings = [(i, j) for i in range(len(players)) for j in range(i)]
    for _ in range(runs):
        tallies = []
        for (i, j), count in zip(
            meetings, generator.multinomial(votes, [1 / len(meetings)] * len(meetings)), strict=True
        ):
            wins = int(generator.binomial(count, strengths[i] / (strengths[i] + strengths[j])))
            tallies += [Tally(players[i], players[j], "a", wins), Tally(players[i], players[j], "b", int(count) - wins)]
        for pair in lead.__wrapped__(tuple(tally for tally in tallies if tally.count)).pairs:
            apart += not 1 - APART < pair.a_above < APART
            pairs += 1
    return apart / pairs


@pytest.mark.parametrize("players", [[SFT, ZERO], [SFT, ZERO, ONE]])
def test_equal_iterates_are_told_apart_as_seldom_as_promised(players, monkeypatch):
    """In 5 of 100; the intervals of ratings, which are centred, would tell 26 to 33 apart."""
    monkeypatch.setattr("spin_ray.serving.arena.ratings.DRAWS", 200)
    assert 0.02 < shares_apart(players, [1.0] * len(players), 200, 250) < 0.08


def test_iterates_that_differ_clearly_are_told_apart(monkeypatch):
    """75 votes of 100 for the better of two, 90 for the best against the worst of three."""
    monkeypatch.setattr("spin_ray.serving.arena.ratings.DRAWS", 200)
    assert shares_apart([SFT, ZERO], [1.0, 3.0], 200, 50) == 1
    assert shares_apart([SFT, ZERO, ONE], [1.0, 3.0, 9.0], 200, 50) > 0.97


def test_a_pair_and_its_neighbours_in_the_ranking_say_the_same():
    board = lead((Tally(SFT, ZERO, "a", 12), Tally(SFT, ZERO, "b", 4), Tally(ZERO, ONE, "a", 9)))
    above = {(pair.a, pair.b): pair.a_above for pair in board.pairs}
    first, second, last = board.ratings
    assert [first.model, second.model, last.model] == ["sft", "iter-0", "iter-1"]
    assert first.above_next == pytest.approx(1 - above["iter-0", "sft"])
    assert second.above_next == pytest.approx(above["iter-0", "iter-1"]) and last.above_next is None


def test_groups_that_never_met_are_rated_each_around_the_mean():
    ratings = rated(Tally(SFT, ZERO, "a", 5), Tally(ONE, ("iter-2", "t"), "a", 5))
    assert ratings["sft"] == pytest.approx(ratings["iter-1"], abs=0.1)


def test_intervals_agree_with_votes_drawn_with_replacement():
    """evalica's own percentile bootstrap of 600 votes; both are random, so to within a tenth of the width."""
    tallies = (Tally(SFT, ZERO, "a", 230), Tally(SFT, ZERO, "b", 370))
    xs, ys, outcomes = [], [], []
    for tally, outcome in zip(tallies, (Winner.X, Winner.Y), strict=True):
        xs += ["sft"] * tally.count
        ys += ["iter-0"] * tally.count
        outcomes += [outcome] * tally.count
    theirs = evalica.bootstrap(
        evalica.bradley_terry, xs, ys, outcomes, n_resamples=500, bootstrap_method="percentile", random_state=1
    )
    (ours,) = [rating for rating in rate(tallies) if rating.model == "sft"]
    low, high = (1000 + 400 * math.log10(bound["sft"]) for bound in (theirs.low, theirs.high))
    assert [ours.low, ours.high] == pytest.approx([low, high], abs=0.1 * (high - low))


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    """60 votes with P(sft wins) = 0.4: the chance of each number of wins, summed over those whose interval holds it."""
    truth = 1000 + 200 * math.log10(0.4 / 0.6)
    held = 0.0
    for wins in range(14, 35):  # all but 0.005 of the probability
        ratings = rate((Tally(SFT, ZERO, "a", wins), Tally(SFT, ZERO, "b", 60 - wins)))
        (sft,) = [rating for rating in ratings if rating.model == "sft"]
        if sft.low <= truth <= sft.high:
            held += float(binom.pmf(wins, 60, 0.4))
    assert 0.92 < held < 0.98


def test_an_iterate_trained_anew_is_another_player():
    assert len(rate((Tally(SFT, ZERO, "a", 1), Tally(SFT, ("iter-0", "new"), "a", 1)))) == 3


def test_no_votes_no_ratings():
    assert lead(()) == ([], [])


def test_a_pair_is_counted_whichever_side_its_checkpoints_were_on():
    tallies = (
        Tally(SFT, ZERO, "a", 2),
        Tally(ZERO, SFT, "a", 3),
        Tally(ZERO, SFT, "tie", 1),
        Tally(SFT, ZERO, "both_bad", 4),
    )
    (pair,) = lead(tallies).pairs
    assert 0.5 < pair.a_above < APART
    assert pair == Pairing("iter-0", "z", "sft", "s", 3, 2, 1, 4, pair.a_above)
