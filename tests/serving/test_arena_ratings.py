"""Bradley-Terry ratings: known answers, an independent solver, and the votes that break plain maximum likelihood."""

import math

import evalica
import numpy as np
import pytest
from evalica import Winner
from scipy.optimize import minimize
from scipy.stats import binom

from spin_ray.serving.arena.battles import Tally
from spin_ray.serving.arena.ratings import Pairing, pairings, rate

SFT, ZERO, ONE = ("sft", "s"), ("iter-0", "z"), ("iter-1", "o")


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
    assert 1100 < best.rating < 1300 and best.high - best.low > 200 and best.low > 1000


def test_groups_that_never_met_are_rated_each_around_the_mean():
    ratings = rated(Tally(SFT, ZERO, "a", 5), Tally(ONE, ("iter-2", "t"), "a", 5))
    assert ratings["sft"] == pytest.approx(ratings["iter-1"], abs=0.1)


def test_intervals_agree_with_votes_drawn_with_replacement():
    """evalica's own percentile bootstrap of 600 votes; both are random, so to within a tenth of the width."""
    tallies = (Tally(SFT, ZERO, "a", 180), Tally(SFT, ZERO, "b", 320), Tally(SFT, ZERO, "tie", 100))
    xs, ys, outcomes = [], [], []
    for tally, outcome in zip(tallies, (Winner.X, Winner.Y, Winner.Draw), strict=True):
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
    assert rate(()) == [] and pairings(()) == []


def test_a_pair_is_counted_whichever_side_its_checkpoints_were_on():
    tallies = [
        Tally(SFT, ZERO, "a", 2),
        Tally(ZERO, SFT, "a", 3),
        Tally(ZERO, SFT, "tie", 1),
        Tally(SFT, ZERO, "both_bad", 4),
    ]
    assert pairings(tallies) == [Pairing("iter-0", "z", "sft", "s", a_wins=3, b_wins=2, ties=1, both_bad=4)]
