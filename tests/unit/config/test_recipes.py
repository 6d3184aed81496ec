"""The recipes that ship: each loads, and the paper's is the paper's."""

import pytest

from spin_ray.config.load import load_config
from spin_ray.config.recipe import flatten
from tests.support.paths import RECIPES as FOLDER

RECIPES = sorted(FOLDER.glob("*.yaml"))

PAPER = {
    "model.path": "alignment-handbook/zephyr-7b-sft-full",
    "model.max_length": 2048,
    "model.revision": "ac6e600eefcce74f5e8bae1035d4f66019e93190",
    "data.train": "hf://datasets/HuggingFaceH4/ultrachat_200k@8049631c405ae6576f93f445c6b8166f76f5505a/data/"
    "train_sft-*.parquet",
    "data.max_rows": 50_000,
    "data.turns": "first",
    "data.prompts_per_iteration": None,
    "iterations": 4,
    "sft": None,
    "generation.samples_per_prompt": 1,
    "generation.sampling.temperature": 1.0,
    "generation.sampling.top_p": 1.0,
    "generation.sampling.top_k": 0,
    "objective.loss": "logistic",
    "objective.beta": [0.1, 0.1, 0.1, 5.0],
    "objective.window": 2,
    "objective.sft_weight": 0.0,
    "train.learning_rate": [5e-7, 5e-7, 1e-7, 1e-7],
    "train.epochs": 2,
    "train.schedule_epochs": 6,
    "train.optimizer.name": "rmsprop",
    "train.optimizer.weight_decay": 0.0,
    "train.optimizer.schedule": "linear",
    "train.optimizer.warmup_fraction": 0.1,
    "train.global_batch_pairs": 64,
    "train.precision": "bf16",
}
"""Section 6.1 and appendix B of arXiv 2401.01335 (sampling, revision of the model, schedule: the authors' code)."""


def test_there_are_recipes():
    assert {recipe.stem for recipe in RECIPES} >= {"demo", "smoke", "zephyr_7b", "smollm2_135m_word_problems"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_loads(recipe):
    config = load_config(recipe)
    assert config.data.heldout, "a recipe without held-out rows would show nothing"


def test_the_zephyr_recipe_has_the_papers_values():
    recipe = flatten(load_config(FOLDER / "zephyr_7b.yaml").model_dump(mode="json"))
    assert {field: recipe[field] for field in PAPER} == PAPER
