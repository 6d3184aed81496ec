"""Predicted packs against those that the learner makes."""

from math import ceil, log

import numpy as np
import pytest

from spin_ray.learner.packing import PairLengths, plan_epoch
from spin_ray.planning.work import LENGTHS_OF_A_PACK, packs_of
from tests.support.planning_cases import PAPER_WORK, ZEPHYR, pair_packs


@pytest.mark.parametrize(
    ("tokens", "sigma", "pack_length", "batch"),
    [(640, 0.6, 4096, 64), (900, 0.3, 4096, 64), (90, 0.6, 256, 16), (110, 0.3, 512, 24), (300, 0.5, 512, 16)],
)
def test_packs_are_predicted_as_plan_epoch_makes_them(tokens, sigma, pack_length, batch):
    """Log-normal lengths; the mean number of packs of a step and their length, of one and of 4 ranks, within 15 %."""
    rng = np.random.default_rng(0)
    columns = [
        np.ceil(rng.lognormal(log(share * tokens) - sigma**2 / 2, sigma, 80 * batch)).astype(int)
        for share in (0.3, 0.4, 0.3)
    ]
    kept = sum(columns) <= pack_length
    prompt, real, generated = (column[kept] for column in columns)
    lengths = PairLengths(prompt=prompt, real=real, generated=generated, tree_key=np.arange(len(prompt)))
    for ranks in (1, 4):
        shape = {"pack_length": pack_length, "global_batch_pairs": batch}
        steps = plan_epoch(lengths, **shape, seed=0, epoch=0, ranks=ranks)[:-1]
        predicted = packs_of(
            len(steps) * batch, float((prompt + real + generated).mean()), 0,
            steps=len(steps), pack_length=pack_length, workers=ranks,
        )  # fmt: skip
        found = np.array([len(step.packs) for step in steps])
        assert predicted.per_step == pytest.approx(found.mean(), rel=0.15)
        assert predicted.per_rank == pytest.approx(np.ceil(found / ranks).mean(), rel=0.15)
        assert predicted.per_rank_at_most >= ceil(np.quantile(found, 0.99) / ranks)
        multiple = pack_length // LENGTHS_OF_A_PACK
        built = [
            ceil(sum((prompt + real + generated)[row] for tree in pack for row in tree) / multiple) * multiple
            for step in steps
            for pack in step.packs
        ]
        assert predicted.length == pytest.approx(np.mean(built), rel=0.15)


def test_two_opponents_of_one_prompt_share_its_tree():
    """Iteration 1 has twice the pairs of iteration 0, in the trees of the same prompts with one more y' each."""
    first, second = (pair_packs(ZEPHYR, PAPER_WORK, iteration) for iteration in (0, 1))
    assert (first.tokens, second.tokens) == (50_000 * 642, 50_000 * 898)
    assert (first.steps, second.steps) == (782, 1563)


def test_slices_of_the_prompts_share_no_trees():
    config = ZEPHYR.model_copy(update={"data": ZEPHYR.data.model_copy(update={"prompts_per_iteration": 10_000})})
    assert [pair_packs(config, PAPER_WORK, iteration).tokens for iteration in (0, 1)] == [642e4, 2 * 642e4]
