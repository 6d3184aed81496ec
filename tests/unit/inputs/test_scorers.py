"""SPPO's preference models, checked before anything is sampled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from spin_ray.errors import ConfigError, DataError, ModelError
from spin_ray.inputs.check import check_recipe
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.scorers import refuse_no_scorer, refuse_too_long
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


def test_a_quantised_classifier_may_judge(tmp_path: Path) -> None:
    """It is not trained. Only config.json tells transformers of it."""
    save_reward_model(tmp_path)
    weights, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj."
    shape = weights.pop(f"{name}weight").shape
    save_file(weights | {f"{name}qweight": torch.zeros(shape, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"it lacks 1 weights, first model\.layers\.0\.mlp\.up_proj\.weight"):
        refuse_no_scorer(tmp_path, "reward")
    changed(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse_no_scorer(tmp_path, "reward")
    without(tmp_path, "score.weight")
    with pytest.raises(ModelError, match=r"it lacks 1 weights, first score\.weight"):
        refuse_no_scorer(tmp_path, "reward")


@pytest.mark.parametrize(("save", "kind"), [(save_reward_model, "reward"), (save_pairrm, "pairrm")])
def test_eight_bits_without_their_scale_are_named(save: Callable[[Path], Path], kind: Any, tmp_path: Path) -> None:
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("embeddings.weight") or "embed_tokens" in name)
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"is no {kind} model .*{name} is F8_E4M3, "):
        refuse_no_scorer(tmp_path, kind)


def test_a_classifier_saved_from_within_fsdp_passes(tmp_path: Path) -> None:
    """transformers writes the name of the wrapped class."""
    changed(save_reward_model(tmp_path), architectures=["FSDPLlamaForSequenceClassification"])
    refuse_no_scorer(tmp_path, "reward")


def test_a_deberta_without_its_head_is_named(tmp_path: Path) -> None:
    """DeBERTa, of which OpenAssistant's reward models are, has eager attention alone."""
    save_reward_model(tmp_path)
    DebertaV2ForSequenceClassification(
        DebertaV2Config(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2, num_labels=1)
    ).save_pretrained(tmp_path)  # fmt: skip
    refuse_no_scorer(tmp_path, "reward")
    without(tmp_path, "classifier.weight")
    with pytest.raises(ModelError, match=r"it lacks 1 weights, first classifier\.weight"):
        refuse_no_scorer(tmp_path, "reward")


def test_a_scorer_cut_off_is_named(tmp_path: Path) -> None:
    weights = save_reward_model(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors: is damaged or cut off"):
        refuse_no_scorer(tmp_path, "reward")


def test_what_compares_no_pairs_is_named(tmp_path: Path) -> None:
    save_pairrm(tmp_path)
    without(tmp_path, "head_layer.4.weight")
    with pytest.raises(ModelError, match=r"is no pairrm model \(it lacks the weights head_layer\.4\.weight\)"):
        refuse_no_scorer(tmp_path, "pairrm")
    with pytest.raises(ModelError, match=r"is no pairrm model \(config\.json has no source_prefix_id\)"):
        refuse_no_scorer(save_reward_model(tmp_path), "pairrm")


def with_positions(folder: Path, kind: str) -> Path:
    """Saves a classifier with a learnt table of 24 positions."""
    vocabulary = {"vocab_size": 64, "num_labels": 1}
    if kind == "gpt2":
        GPT2ForSequenceClassification(
            GPT2Config(n_positions=24, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, **vocabulary)
        ).save_pretrained(folder)
        return folder
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    of_text = {
        "max_position_embeddings": 26 if kind == "roberta" else 24,
        "pad_token_id": 1 if kind == "roberta" else 0,
    }
    config = {"roberta": RobertaConfig, "bert": BertConfig}[kind](**vocabulary, **shape, **of_text)
    model = {"roberta": RobertaForSequenceClassification, "bert": BertForSequenceClassification}[kind](config)
    model.save_pretrained(folder)
    with torch.no_grad():
        model.eval()(input_ids=torch.full((1, 24), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 25), 5))
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta"])
def test_texts_longer_than_the_learnt_positions_are_refused(kind: str, tmp_path: Path) -> None:
    folder = with_positions(tmp_path / "model", kind)
    refuse_too_long(folder, 24)
    with pytest.raises(ConfigError, match=r"^scorer\.max_length: 25 is more than the 24 positions of .*; set 24 or"):
        refuse_too_long(folder, 25)


def test_rotary_and_relative_positions_have_no_end(tmp_path: Path) -> None:
    """PairRM's config.json has 512 positions, and the paper's inputs 2048 tokens."""
    refuse_too_long(save_reward_model(tmp_path / "reward"), 10_000)
    relative = DebertaV2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        max_position_embeddings=512, position_biased_input=False, relative_attention=True,
    )  # fmt: skip
    DebertaV2ForSequenceClassification(relative).save_pretrained(tmp_path / "relative")
    refuse_too_long(tmp_path / "relative", 2048)


def sppo_with(folder: Path, **scorer: Any) -> Any:
    recipe = config_for(generation={"samples_per_prompt": 2}).model_dump()
    return type(config_for()).model_validate(
        recipe | {"algorithm": "sppo", "scorer": {"path": str(folder), "max_length": 64} | scorer}
    )


def test_a_template_that_refuses_the_roles_of_a_row_is_told_at_the_start(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "reward")
    check_recipe(sppo_with(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    tokenizer.save_pretrained(folder)
    said = r"^scorer\.path .*: its chat template refuses .*:1, with the roles user, assistant \(no user here\); "
    with pytest.raises(DataError, match=said):
        check_recipe(sppo_with(folder))


def test_a_start_compares_the_positions(tmp_path: Path) -> None:
    folder = with_positions(tmp_path / "gpt2", "gpt2")
    AutoTokenizer.from_pretrained(resolve("embedded:tiny-llama")).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"^scorer\.max_length: 64 is more than the 24 positions"):
        check_recipe(sppo_with(folder))


def test_a_start_asks_it(tmp_path: Path) -> None:
    KINDS["Llama"].make().save_pretrained(tmp_path)
    recipe = config_for(generation={"samples_per_prompt": 2}).model_dump()
    config = type(config_for()).model_validate(recipe | {"algorithm": "sppo", "scorer": {"path": str(tmp_path)}})
    with pytest.raises(ModelError, match="is no reward model"):
        check_recipe(config)
