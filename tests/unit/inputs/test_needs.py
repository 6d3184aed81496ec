"""What each algorithm needs of the rows."""

from typing import get_args

import pytest

from spin_ray.config.sections import AlgorithmName
from spin_ray.inputs.needs import RowNeeds, most_pairs, needs_of
from spin_ray.loop.algorithms.table import ALGORITHMS
from tests.support.planning_cases import ZEPHYR


@pytest.mark.parametrize("algorithm", get_args(AlgorithmName))
def test_the_most_pairs_of_a_prompt_are_known_of_each_algorithm(algorithm):
    sampled = ZEPHYR.generation.model_copy(update={"samples_per_prompt": 4})
    config = ZEPHYR.model_copy(update={"algorithm": algorithm, "generation": sampled})
    assert most_pairs(config) == (4 if algorithm in ("spin", "tspin", "sdft", "seft") else 1)


def test_the_table_says_of_questions_what_the_algorithms_say():
    """And tools of a row are no part of the prompts that seft and sdft write themselves."""
    for name, algorithm in ALGORITHMS.items():
        needs = needs_of(ZEPHYR.model_copy(update={"algorithm": name}))
        assert needs.plays_questions == ("data.questions" in (*algorithm.needs, *algorithm.reads)), name
        assert (needs.rejected, needs.takes_tools) == (name == "dpo", name not in ("seft", "sdft")), name


def test_of_an_algorithm_from_outside_nothing_is_asked():
    config = ZEPHYR.model_copy(update={"algorithm": "my_pkg.mine:Mine"})
    assert needs_of(config) == RowNeeds() and most_pairs(config) is None
