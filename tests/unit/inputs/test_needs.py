"""What each algorithm needs of the rows."""

from typing import get_args

import pytest

from spin_ray.config.sections import AlgorithmName
from spin_ray.inputs.needs import RowNeeds, most_pairs, needs_of
from tests.support.planning_cases import ZEPHYR


@pytest.mark.parametrize("algorithm", get_args(AlgorithmName))
def test_the_most_pairs_of_a_prompt_are_known_of_each_algorithm(algorithm):
    sampled = ZEPHYR.generation.model_copy(update={"samples_per_prompt": 4})
    config = ZEPHYR.model_copy(update={"algorithm": algorithm, "generation": sampled})
    assert most_pairs(config) == (4 if algorithm in ("spin", "tspin", "sdft", "seft") else 1)


def test_of_an_algorithm_from_outside_nothing_is_asked():
    config = ZEPHYR.model_copy(update={"algorithm": "my_pkg.mine:Mine"})
    assert needs_of(config) == RowNeeds() and most_pairs(config) is None
