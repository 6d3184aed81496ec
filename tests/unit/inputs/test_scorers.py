"""SPPO's preference models, checked before anything is sampled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from spin_ray.errors import ModelError
from spin_ray.inputs.check import check_recipe
from spin_ray.inputs.scorers import refuse_no_scorer
from tests.support.model_kinds import KINDS
from tests.support.preference_models import save_pairrm, save_reward_model
from tests.unit.inputs.test_check import config_for


def changed(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


def test_both_kinds_pass(tmp_path: Path) -> None:
    refuse_no_scorer(save_reward_model(tmp_path / "reward"), "reward")
    (tmp_path / "pairrm").mkdir()
    refuse_no_scorer(save_pairrm(tmp_path / "pairrm"), "pairrm")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: KINDS["Llama"].make().save_pretrained(folder),
         "it holds a LlamaForCausalLM, whose reward would be random; take a LlamaForSequenceClassification"),
        (lambda folder: without(folder, "score.weight"), "it lacks 1 weights, first score.weight"),
        (lambda folder: changed(folder, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}, num_labels=2),
         "it has 2 outputs, a reward model has one"),
        (lambda folder: changed(folder, model_type="mamba2", architectures=["Mamba2ForSequenceClassification"]),
         "has no classifier of sequences for a model of type mamba2"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "its tokenizer does not load"),
    ],
)  # fmt: skip
def test_what_gives_no_reward_is_named(damage: Callable[[Path], Any], reason: str, tmp_path: Path) -> None:
    """transformers loads a causal model as a classifier, with a random head and a warning."""
    damage(save_reward_model(tmp_path))
    with pytest.raises(ModelError, match=f"scorer.path .*: is no reward model .*{reason}") as caught:
        refuse_no_scorer(tmp_path, "reward")
    assert "\n" not in str(caught.value)


def test_what_compares_no_pairs_is_named(tmp_path: Path) -> None:
    save_pairrm(tmp_path)
    without(tmp_path, "head_layer.4.weight")
    with pytest.raises(ModelError, match=r"is no pairrm model \(it lacks the weights head_layer\.4\.weight\)"):
        refuse_no_scorer(tmp_path, "pairrm")
    with pytest.raises(ModelError, match=r"is no pairrm model \(config\.json has no source_prefix_id\)"):
        refuse_no_scorer(save_reward_model(tmp_path), "pairrm")


def test_a_start_asks_it(tmp_path: Path) -> None:
    KINDS["Llama"].make().save_pretrained(tmp_path)
    recipe = config_for(generation={"samples_per_prompt": 2}).model_dump()
    config = type(config_for()).model_validate(recipe | {"algorithm": "sppo", "scorer": {"path": str(tmp_path)}})
    with pytest.raises(ModelError, match="is no reward model"):
        check_recipe(config)
