"""``spin-ray init --from``: configs of TRL, axolotl and LLaMA-Factory become settings; nothing is lost."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from spin_ray.config.load import parse_config
from spin_ray.errors import ConfigError
from spin_ray.inputs.survey import Survey
from spin_ray.loop.algorithms.table import check_settings
from spin_ray.loop.init.command import Options, init
from spin_ray.loop.init.foreign import Foreign
from spin_ray.loop.init.foreign_config import read_foreign
from spin_ray.loop.init.foreign_steps import by_rows
from spin_ray.loop.init.look import Look
from spin_ray.loop.init.settings import tree_of


def read(folder: Path, config: dict[str, Any], name: str = "config.yaml", devices: int = 1) -> Foreign:
    file = folder / name
    file.write_text(json.dumps(config) if name.endswith(".json") else yaml.safe_dump(config))
    return read_foreign(file, devices)


def values(found: Foreign) -> dict[str, Any]:
    return {place: setting.value for place, setting in found.settings.items()}


def objective_of(found: Foreign) -> dict[str, Any]:
    return tree_of(found.settings).get("objective", {})


def check(found: Foreign) -> None:
    """The settings alone make a recipe that a run would take, with room for packs and responses."""
    tree = tree_of(found.settings)
    tree.setdefault("data", {}).setdefault("train", "rows.jsonl")
    tree.setdefault("generation", {})["sampling"] = {"max_tokens": 64}
    tree.setdefault("train", {})["pack_length"] = 8192
    check_settings(parse_config(tree, source=str(found.file)))


TRL_DPO = {
    "model_name_or_path": "org/base", "model_revision": "v2", "dataset_name": "org/prefs", "dataset_config": "clean",
    "dataset_train_split": "train_prefs", "dataset_test_split": "test_prefs", "beta": 0.05, "loss_type": "hinge",
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": "5e-7", "max_length": 1536,
    "num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "optim": "adamw_torch", "bf16": True,
    "use_peft": True, "lora_r": 64, "lora_alpha": 128, "lora_target_modules": ["q_proj", "v_proj"],
    "weight_decay": 0.01, "adam_beta2": 0.95, "seed": 7, "output_dir": "out/dpo", "lora_dropout": 0.05,
    "report_to": "wandb",
}  # fmt: skip


def test_a_dpo_config_of_trl(tmp_path):
    """8 devices of 2 × 4 pairs are a batch of 64."""
    found = read(tmp_path, TRL_DPO, devices=8)
    hub = "hf://datasets/org/prefs@refs/convert/parquet/clean"
    assert values(found) == {
        "algorithm": "dpo", "iterations": 1, "model.path": "org/base@v2", "model.max_length": 1536, "seed": 7,
        "data.train": f"{hub}/train_prefs/*.parquet", "data.heldout": f"{hub}/test_prefs/*.parquet",
        "train.lora.rank": 64, "train.lora.alpha": 128, "train.lora.target_modules": ["q_proj", "v_proj"],
        "train.global_batch_pairs": 64, "train.learning_rate": 5e-7, "train.epochs": 1,
        "train.optimizer.name": "adamw", "train.optimizer.weight_decay": 0.01, "train.optimizer.max_grad_norm": 1.0,
        "train.optimizer.betas": [0.9, 0.95], "train.optimizer.schedule": "cosine",
        "train.optimizer.warmup_fraction": 0.1, "train.precision": "bf16", "objective.beta": 0.05,
        "objective.loss": "hinge",
    }  # fmt: skip
    assert set(found.left) == {"lora_dropout", "report_to"} and found.output == "out/dpo"
    check(found)


LF_DPO = {"model_name_or_path": "org/base", "model_revision": "v2", "stage": "dpo"}
AX_DPO = {"base_model": "org/base", "rl": "dpo"}


@pytest.mark.parametrize(
    ("said", "path", "base", "left"),
    [
        (LF_DPO | {"adapter_name_or_path": "saves/sft"}, "saves/sft", "org/base@v2", set()),
        (LF_DPO | {"adapter_name_or_path": ["saves/sft"]}, "saves/sft", "org/base@v2", set()),
        (LF_DPO | {"adapter_name_or_path": ""}, "org/base@v2", None, set()),
        (AX_DPO | {"adapter": "lora", "lora_model_dir": "./out/sft"}, "./out/sft", "org/base", set()),
        (AX_DPO | {"lora_model_dir": "./out/sft"}, "org/base", None, {"lora_model_dir"}),
    ],
)
def test_a_training_that_starts_from_an_adapter_starts_from_it_here(tmp_path, said, path, base, left):
    found = read(tmp_path, said)
    got = values(found)
    assert (got["model.path"], got.get("model.base"), set(found.left)) == (path, base, left)
    check(found)


def test_the_reference_of_llama_factory_is_the_base_below_the_adapter(tmp_path):
    """With ``create_new_adapter`` it merges the first adapter, so the reference is the same as here."""
    said = LF_DPO | {"adapter_name_or_path": "saves/sft"}
    reference = "reference there is the base alone"
    assert reference in read(tmp_path, said).settings["model.path"].why
    assert reference not in read(tmp_path, said | {"create_new_adapter": True}).settings["model.path"].why


def test_what_a_config_is_silent_about_is_the_tool_s_default_and_not_ours(tmp_path):
    """TRL's DPO without a word: 1e-6, 3 epochs, batches of 8, no warm-up, 1024 tokens; a recipe's defaults differ."""
    found = read(tmp_path, {"model_name_or_path": "org/base", "beta": 0.1})
    assert values(found) | {
        "train.learning_rate": 1e-6, "train.epochs": 3, "train.global_batch_pairs": 8, "model.max_length": 1024,
        "train.optimizer.name": "adamw", "train.optimizer.warmup_fraction": 0.0, "seed": 42,
    } == values(found)  # fmt: skip
    assert found.settings["train.learning_rate"].why == "TRL's default"


def test_an_sft_config_of_axolotl(tmp_path):
    """Its training is the warm-up; the learning rate of adapters is not one of all weights."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    config = {
        "base_model": "org/base",
        "datasets": [{"path": str(rows), "type": "chat_template", "split": "train[:10%]"}],
        "test_datasets": [{"path": "json", "data_files": "held.jsonl"}], "sequence_len": 4096, "micro_batch_size": 2,
        "gradient_accumulation_steps": 8, "num_epochs": 2.5, "optimizer": "paged_adamw_8bit",
        "lr_scheduler": "constant", "learning_rate": 0.0002,
        "adapter": "qlora", "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True,
        "warmup_steps": 10, "val_set_size": 0.05, "sample_packing": True, "bf16": "auto", "max_grad_norm": 0,
        "special_tokens": None,
    }  # fmt: skip
    found = read(tmp_path, config)
    assert values(found) == {
        "model.path": "org/base", "model.max_length": 4096, "seed": 42, "data.train": str(rows),
        "data.heldout": "held.jsonl", "train.lora.rank": 32, "train.lora.alpha": 16,
        "train.lora.target_modules": "all-linear", "sft.global_batch_rows": 16, "sft.epochs": 2,
        "sft.optimizer.name": "adamw", "sft.optimizer.weight_decay": 0.0, "sft.optimizer.max_grad_norm": 1e6,
        "sft.optimizer.schedule": "constant", "sft.optimizer.warmup_fraction": 0.0,
    }  # fmt: skip
    assert set(found.left) == {
        "adapter", "optimizer", "learning_rate", "num_epochs", "val_set_size", "sample_packing", "datasets.0.type",
        "datasets.0.split", "warmup_steps",
    }  # fmt: skip
    check(found)


def test_a_data_set_that_is_in_no_registry_is_named_with_the_place_that_was_searched(tmp_path, monkeypatch):
    """LLaMA-Factory's own registry is in its repository, not beside a config."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sft.yaml"
    file.write_text("model_name_or_path: org/base\nstage: sft\ndataset: identity\ntemplate: llama3\n")
    options = Options(recipe=tmp_path / "my.yaml", source=file, gpu="none")
    with pytest.raises(
        ConfigError, match=r"data.train: is not given \(identity is not in data/dataset_info.json; give"
    ):
        init(options, None, Console())
    (tmp_path / "dataset_info.json").write_text(json.dumps({"identity": {"file_name": "identity.json"}}))
    assert values(read_foreign(file, 1))["data.train"] == str(tmp_path / "identity.json")


def test_configs_of_llama_factory_name_rows_in_its_registry(tmp_path):
    """JSON; adapters are its default; two data sets are two sources."""
    (tmp_path / "data").mkdir()
    registry = {
        "chats": {"file_name": "chats.json", "formatting": "sharegpt"},
        "hub": {"hf_hub_url": "org/rows"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(registry))
    config = {
        "model_name_or_path": "org/base", "stage": "dpo", "dataset": "chats, hub", "template": "llama3",
        "cutoff_len": 1024, "pref_beta": 0.2, "pref_loss": "ipo", "lora_rank": 8, "lora_target": "q_proj,v_proj",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "warmup_steps": 0.2, "max_samples": 500,
        "fp16": True, "lr_scheduler_type": "cosine_with_restarts",
    }  # fmt: skip
    found = read(tmp_path, config, "config.json")
    got = values(found)
    assert got["data.train"] == [
        {"path": str(tmp_path / "data" / "chats.json")},
        {"path": "hf://datasets/org/rows@refs/convert/parquet/default/train/*.parquet"},
    ]
    assert (got["train.lora.rank"], got["train.lora.alpha"]) == (8, 16)
    assert got["train.lora.target_modules"] == ["q_proj", "v_proj"]
    assert (got["train.global_batch_pairs"], got["train.learning_rate"]) == (8, 5e-5)
    assert got["train.optimizer.warmup_fraction"] == 0.2
    assert set(found.left) == {
        "template", "pref_loss", "pref_beta", "max_samples", "fp16", "lr_scheduler_type", "dataset.0.formatting",
    }  # fmt: skip
    assert found.left["pref_loss"] == "has no equal here" and objective_of(found) == {}
    check(found)


def test_what_is_half_carried_over_is_listed(tmp_path):
    """Losses that are added up, a split of local files, and a longest input that is set to none."""
    data = {"path": "./rows", "split": "validation"}
    said = {
        "model_name_or_path": "m",
        "datasets": [data],
        "beta": 0.1,
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
        "max_length": None,
    }
    found = read(tmp_path, said)
    assert set(found.left) == {"loss_type", "loss_weights", "datasets.0.split"}
    assert "model.max_length" not in found.settings and objective_of(found) == {"beta": 0.1}


@pytest.mark.parametrize(("loss", "told"), [("dft", True), ("chunked_nll", False), ("nll", False)])
def test_another_loss_of_an_sft_config_is_told(tmp_path, loss, told):
    found = read(tmp_path, {"model_name_or_path": "m", "dataset_name": "d", "loss_type": loss}, "sft.yaml")
    assert ("maximises the likelihood" in found.left.get("loss_type", "")) == told


def test_a_data_set_that_is_in_no_registry_stays_open(tmp_path):
    found = read(tmp_path, {"model_name_or_path": "m/m", "stage": "sft", "finetuning_type": "full", "dataset": "mine"})
    assert "data.train" not in found.settings and "mine is not in" in found.left["dataset"]
    assert not any(place.startswith("train.lora") for place in found.settings)


def rows_of(count: int, length: int) -> Look:
    found = Survey("rows.jsonl", 2048, ["rows.jsonl"], [], True, count, count, Counter(messages=count))
    found.lengths = [length] * count
    return Look(train=(found,), rows=count)


def test_packs_and_steps_become_rows_passes_and_fractions(tmp_path):
    """2 × 4 packs of 2048 tokens hold 8 rows of 256 each: 64 rows a step, 10 steps a pass; 25 steps are 2 passes."""
    said = {"base_model": "m", "sequence_len": 2048, "micro_batch_size": 2, "gradient_accumulation_steps": 4}
    said |= {"sample_packing": True, "warmup_steps": 5, "num_epochs": 3}
    found = read(tmp_path, said)
    settled = {place: it.value for place, it in by_rows(found, found.settings, rows_of(640, 256)).items()}
    assert settled["sft.global_batch_rows"] == 64 and settled["sft.optimizer.warmup_fraction"] == round(5 / 30, 4)
    assert "warmup_steps" not in found.left and "8 packs" in found.left["sample_packing"]
    found = read(tmp_path, said | {"max_steps": 25})
    settled = {place: it.value for place, it in by_rows(found, found.settings, rows_of(640, 256)).items()}
    assert settled["sft.epochs"] == 2 and settled["sft.optimizer.warmup_fraction"] == 0.25
    assert found.left["max_steps"] == "is 2.5 passes over the rows; whole ones only: 2"
    unseen = read(tmp_path, said)
    assert by_rows(unseen, unseen.settings, Look()) == unseen.settings and "warmup_steps" in unseen.left


@pytest.mark.parametrize(
    ("rows", "more", "fraction"),
    [
        (40_000, {}, 100 / 20_000),
        (400, {}, 0.03),
        (40_000, {"warmup_ratio": 0.03}, 0.03),
        (40_000, {"warmup_steps": 0}, 0.0),
        (40_000, {"lr_scheduler": "constant"}, 0.0),
    ],
)
def test_axolotl_s_default_warm_up_has_at_most_100_steps(tmp_path, rows, more, fraction):
    """4 passes over 40,000 rows in batches of 8 are 20,000 steps."""
    found = read(tmp_path, {"base_model": "m", "micro_batch_size": 8, "num_epochs": 4} | more)
    settled = by_rows(found, found.settings, rows_of(rows, 256))
    assert settled["sft.optimizer.warmup_fraction"].value == fraction


def test_bits_and_scales_of_adapters(tmp_path):
    """QLoRA; rsLoRA's scale α/√16 is 4 times α/16, and √8 makes no whole α; a pattern of PEFT is no list of names."""
    said = {"model_name_or_path": "m", "use_peft": True, "lora_r": 16, "lora_alpha": 8, "beta": 0.1}
    more = {"load_in_4bit": True, "use_rslora": True, "lora_target_modules": r".*\.(q|v)_proj"}
    found = read(tmp_path, said | more)
    lora = {place.removeprefix("train.lora."): value for place, value in values(found).items() if "lora" in place}
    assert lora == {"base": "nf4", "merge": False, "rank": 16, "alpha": 32}
    assert set(found.left) == {"lora_target_modules"}
    check(found)
    odd = read(tmp_path, said | {"lora_r": 8, "use_rslora": True})
    assert values(odd)["train.lora.alpha"] == 23
    assert odd.left == {"use_rslora": "the alpha of its scale is 22.63; whole ones only: 23"}
    assert not read(tmp_path, said | {"lora_r": 8, "lora_alpha": 16, "use_rslora": True}).left  # 45 for 45.25
    eight = read(tmp_path, {"model_name_or_path": "m", "stage": "sft", "quantization_bit": 8})
    assert values(eight)["train.lora.base"] == "int8"


def test_numbers_that_mean_something_else_here_are_not_taken_over(tmp_path):
    """No steps of warm-up beside a ratio, kin of AdamW, SimPO's β; an added SFT loss is a mean over rows there."""
    said = {"model_name_or_path": "m", "stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.5, "pref_ftx": 0.5}
    found = read(tmp_path, said | {"optim": "galore_adamw", "warmup_steps": 0, "warmup_ratio": 0.1})
    got = values(found)
    assert "objective.beta" not in got and "objective.loss" not in got and "train.optimizer.name" not in got
    assert got["train.optimizer.warmup_fraction"] == 0.1 and got["objective.sft_weight"] == 0.5
    assert set(found.left) == {"pref_loss", "pref_beta", "optim"}
    assert "means per row there, over all tokens of a step here" in found.settings["objective.sft_weight"].why


TRL, AXOLOTL = {"model_name_or_path": "m", "beta": 0.2}, {"base_model": "m", "rl": "dpo", "rl_beta": 0.2}


@pytest.mark.parametrize(
    ("entry", "columns", "left"),
    [
        ({"columns": {"prompt": "frage", "response": "antwort", "images": "bilder"}},
         {"instruction": "frage", "output": "antwort"}, "images: is not read"),
        ({"columns": {"prompt": "instruction", "query": "kontext"}}, {"input": "kontext"}, None),
        ({"formatting": "sharegpt", "ranking": True, "columns": {"messages": "verlauf", "chosen": "gut"}},
         {"conversations": "verlauf", "chosen": "gut"}, None),
        ({"formatting": "sharegpt", "columns": {"messages": "conversations"}}, None, None),
    ],
)  # fmt: skip
def test_columns_of_the_registry_are_read(tmp_path, entry, columns, left):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"} | entry}))
    found = read(tmp_path, {"model_name_or_path": "m", "stage": "sft", "dataset": "rows"})
    assert values(found).get("data.columns") == columns and found.left.get("dataset.0.columns") == left
    check(found)


def test_columns_that_differ_between_data_sets_are_said(tmp_path):
    first, other = ({"file_name": "a.json", "columns": {"prompt": name}} for name in ("frage", "question"))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": first, "b": other, "c": first}))
    said = {"model_name_or_path": "m", "stage": "sft"}
    assert values(read(tmp_path, said | {"dataset": "a,c"}))["data.columns"] == {"instruction": "frage"}
    both = read(tmp_path, said | {"dataset": "a,b"})
    assert "data.columns" not in values(both) and {"dataset.0.columns", "dataset.1.columns"} <= set(both.left)
    beside = read(tmp_path, said | {"dataset": "a", "eval_dataset": "b"})
    assert values(beside)["data.columns"] == {"instruction": "frage"} and "eval_dataset.0.columns" in beside.left


def test_several_held_out_data_sets_are_a_list(tmp_path):
    held = [{"path": "json", "data_files": "a.jsonl"}, {"path": "json", "data_files": "b.jsonl"}]
    found = read(tmp_path, {"base_model": "m", "datasets": [{"path": "rows.jsonl"}], "test_datasets": held})
    assert values(found)["data.heldout"] == [{"path": "a.jsonl"}, {"path": "b.jsonl"}] and not found.left
    check(found)


@pytest.mark.parametrize(
    ("said", "objective", "left"),
    [
        (TRL | {"loss_type": "ipo"}, {}, {"loss_type", "beta"}),
        (TRL | {"loss_type": ["sppo_hard"]}, {}, {"loss_type", "beta"}),
        (TRL | {"loss_type": ["sigmoid", "ipo"]}, {}, {"loss_type", "beta"}),
        (TRL | {"loss_type": ["sigmoid", "sigmoid_norm"]}, {}, {"loss_type", "beta"}),
        (TRL | {"loss_type": "robust"}, {"beta": 0.2}, {"loss_type"}),
        (AXOLOTL | {"rl": "ipo"}, {}, {"rl", "rl_beta"}),
        (AXOLOTL | {"trl": {"beta": 0.3, "use_vllm": True}}, {"beta": 0.3}, {"rl_beta", "trl.use_vllm"}),
        (AXOLOTL | {"dpo_beta": 0.2}, {"beta": 0.2}, {"dpo_beta"}),
        (
            TRL | {"loss_type": "sigmoid_norm"},
            {"loss": "logistic", "length_normalised": True, "beta": 0.2},
            set(),
        ),
        (
            TRL | {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]},
            {"loss": "logistic", "beta": 0.2, "sft_weight": 0.5},
            set(),
        ),
        (
            AXOLOTL | {"dpo_loss_type": ["sft", "hinge"], "dpo_loss_weights": [0.5, 2.0]},
            {"loss": "hinge", "beta": 0.2, "sft_weight": 0.25},
            {"dpo_loss_weights"},
        ),
        (TRL | {"loss_type": ["sigmoid", "sft"]}, {"loss": "logistic", "beta": 0.2, "sft_weight": 1.0}, set()),
    ],
)
def test_the_loss_and_its_numbers(tmp_path, said, objective, left):
    """β is carried if it scales log-ratios there; an SFT loss counts relative to the loss of pairs."""
    found = read(tmp_path, said)
    assert objective_of(found) == objective and set(found.left) == left
    check(found)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_name_or_path": "m", "stage": "ppo"}, "stage is ppo"),
        ({"base_model": "m", "rl": "grpo"}, "rl is grpo"),
        ({"model_name_or_path": "m", "beta": 0.04, "num_generations": 8}, "num_generations is of another method"),
        ({"model_name_or_path": "m", "beta": 0.1, "loss_type": ["kto"]}, "loss_type kto is of another method"),
        ({"model_name_or_path": "m", "center_rewards_coefficient": 0.01}, "center_rewards_coefficient is of another"),
        (
            {"model_name_or_path": "m", "beta": 0.05, "output_dir": "data/zephyr-orpo-141b"},
            "orpo in the name of output",
        ),
        (
            {"model_name_or_path": "m", "beta": 0.05, "hub_model_id": "me/zephyr-ORPO"},
            "orpo in the name of hub_model_id",
        ),
        ({"model_name_or_path": "m", "run_name": "reward_v2"}, "reward in the name of run_name is of another method"),
        ({"base_model": "m", "reward_model": True}, "reward_model is of another method"),
        ({"base_model": "m", "process_reward_model": True}, "process_reward_model is of another method"),
        ({"base_model": "m", "model_type": "AutoModelForSequenceClassification"}, "model_type AutoModelForSequenceC"),
        ({"base_model": "m", "model_type": "LlamaForTokenClassification"}, "model_type LlamaForTokenClassification"),
        ({"base_model": "m", "datasets": [{"path": "d", "type": "completion"}]}, "datasets' type completion is of"),
        ({"base_model": "m", "datasets": [{"path": "d", "type": "bradley_terry.chat_template"}]}, "type bradley_terry"),
        ({"base_model": "m", "pretraining_dataset": [{"path": "d"}]}, "pretraining_dataset is of another method"),
        ({"learning_rate": 1}, "no SFT or DPO config"),
        ({"base_model": "m", "micro_batch_size": 1, "learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"model_name_or_path": "m", "stage": "dpo", "adapter_name_or_path": "a,b"}, "names 2 adapters, and one can"),
        ({"base_model": "m", "micro_batch_size": "auto"}, "micro_batch_size is 'auto'"),
        (
            {"model_name_or_path": "m", "beta": 0.1, "loss_weights": [1, 0.5]},
            r"loss_weights is \[1, 0.5\], which is no",
        ),
    ],
)
def test_other_methods_and_other_files_are_refused(tmp_path, config, words):
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, config)


@pytest.mark.parametrize(
    "name",
    ["orpo.yaml", "my_kto_run.yaml", "orpo/config.yaml", "zephyr-orpo/config_full.yaml", "orpo/zephyr/config.yaml"],
)
def test_a_name_that_tells_of_another_method_is_believed(tmp_path, name):
    """ORPO's config has the keys of DPO's: its λ would become β."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(ConfigError, match=r"(orpo|kto).* is of another method"):
        read(tmp_path, {"model_name_or_path": "m", "beta": 0.05}, name)


@pytest.mark.parametrize(
    ("name", "said", "algorithm"),
    [
        ("dpo/config.yaml", {"beta": 0.1, "output_dir": "out/orpo-then-that"}, "dpo"),
        ("dpo.yaml", {"beta": 0.1, "run_name": "after-kto"}, "dpo"),
        ("config.yaml", {"beta": 0.1, "output_dir": "out/dpo-against-orpo"}, "dpo"),
        ("orpo_vs_dpo/config.yaml", {"beta": 0.1}, "dpo"),
        ("grpo-project/configs/config.yaml", {"beta": 0.1}, "dpo"),
        ("support/config.yaml", {"output_dir": "out/corporate-rewarded", "hub_model_id": "me/skto-import"}, None),
        ("config.yaml", {"model_name_or_path": "me/zephyr-orpo", "dataset_name": "me/ppo-data"}, None),
        ("a.yaml", {"base_model": "me/reward", "output_dir": "out/reward", "model_type": "LlamaForCausalLM"}, None),
        ("a.yaml", {"base_model": "m", "reward_model": False, "datasets": [{"path": "d", "type": "alpaca"}]}, None),
    ],
)
def test_a_word_elsewhere_is_no_method(tmp_path, name, said, algorithm):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    config = said if "base_model" in said else {"model_name_or_path": "m"} | said
    assert values(read(tmp_path, config, name)).get("algorithm") == algorithm
