"""What is known of each algorithm without its class is what the class says."""

from typing import get_args

import pytest

from spin_ray.config.algorithms import _FACTS, AlgorithmName, Facts, facts_of
from spin_ray.inputs.check import most_pairs
from spin_ray.loop.algorithms.table import ALGORITHMS
from tests.support.planning_cases import ZEPHYR


def test_every_name_of_a_recipe_has_its_facts_and_its_class():
    assert {*get_args(AlgorithmName)} == _FACTS.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("algorithm", get_args(AlgorithmName))
def test_the_most_pairs_of_a_prompt_are_known_of_each_algorithm(algorithm):
    sampled = ZEPHYR.generation.model_copy(update={"samples_per_prompt": 4})
    config = ZEPHYR.model_copy(update={"algorithm": algorithm, "generation": sampled})
    assert most_pairs(config) == (4 if algorithm in ("spin", "tspin", "sdft", "seft") else 1)


def test_the_facts_are_what_the_algorithms_say():
    """And tools of a row are no part of the prompts that seft and sdft write themselves."""
    for name, algorithm in ALGORITHMS.items():
        facts = facts_of(name)
        assert facts.plays_questions == ("data.questions" in (*algorithm.needs, *algorithm.reads)), name
        assert (facts.rejected, facts.takes_tools) == (name == "dpo", name not in ("seft", "sdft")), name
        objective = algorithm.objective(ZEPHYR, 0)
        assert facts.learns_loss == (objective.loss == ZEPHYR.objective.loss), name
        if facts.learns_loss:
            assert "loss" in algorithm.objective_fields, name


def test_of_an_algorithm_from_outside_nothing_is_asked():
    config = ZEPHYR.model_copy(update={"algorithm": "my_pkg.mine:Mine"})
    assert facts_of(config.algorithm) == Facts() and most_pairs(config) is None
