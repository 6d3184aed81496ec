"""Keys and defaults of TRL 1.16, transformers 5.19, axolotl 0.19 and LLaMA-Factory 0.9.5."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Tool(NamedTuple):
    name: str
    keys: Mapping[str, str]
    """Facts (see ``Foreign``) by the tool's own keys. Of two keys for one fact the tool reads the first."""
    defaults: Mapping[str, Any]
    """Default values by fact."""
    sft: Mapping[str, Any] = {}
    """Further defaults for SFT."""
    dpo: Mapping[str, Any] = {}
    """Further defaults for DPO."""


_TRAINER = {
    "trust_remote_code": "trusted", "output_dir": "output", "seed": "seed", "bf16": "bf16", "fp16": "fp16",
    "learning_rate": "learning_rate", "weight_decay": "weight_decay", "max_grad_norm": "max_grad_norm",
    "adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "eps", "warmup_ratio": "warmup_fraction",
    "warmup_steps": "warmup_steps", "gradient_accumulation_steps": "accumulation", "max_steps": "max_steps",
}  # fmt: skip
"""Keys of transformers' Trainer, which all three tools have."""
_HUGGING_FACE = _TRAINER | {
    "model_name_or_path": "model", "model_revision": "revision", "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch", "lr_scheduler_type": "schedule", "optim": "optimizer",
}  # fmt: skip
_TRAINER_DEFAULTS = {
    "micro_batch": 8, "accumulation": 1, "epochs": 3, "optimizer": "adamw", "schedule": "linear", "weight_decay": 0.0,
    "warmup_fraction": 0.0, "max_grad_norm": 1.0, "seed": 42,
}  # fmt: skip

TRL = Tool(
    "TRL",
    _HUGGING_FACE
    | {
        "datasets": "train", "dataset_mixer": "train", "dataset_name": "train", "dataset_config": "subset",
        "dataset_train_split": "split", "dataset_test_split": "heldout_split",
        "dataset_splits": "splits", "max_length": "max_length",
        "max_seq_length": "max_length", "beta": "beta", "loss_type": "loss", "use_peft": "lora", "lora_r": "rank",
        "lora_alpha": "alpha", "lora_target_modules": "targets", "use_rslora": "rslora", "load_in_4bit": "four_bits",
        "load_in_8bit": "eight_bits", "packing": "packing", "rpo_alpha": "sft_weight", "loss_weights": "loss_weights",
    },
    _TRAINER_DEFAULTS | {"max_length": 1024, "rank": 16, "alpha": 32},
    sft={"learning_rate": 2e-5},
    dpo={"learning_rate": 1e-6, "beta": 0.1},
)  # fmt: skip
AXOLOTL = Tool(
    "axolotl",
    _TRAINER
    | {
        "base_model": "model", "revision_of_model": "revision", "datasets": "train", "test_datasets": "heldout",
        "sequence_len": "max_length", "micro_batch_size": "micro_batch", "num_epochs": "epochs",
        "optimizer": "optimizer", "lr_scheduler": "schedule", "rl": "method", "trl.beta": "beta", "rl_beta": "beta",
        "dpo_beta": "beta", "dpo_loss_type": "loss", "dpo_loss_weights": "loss_weights",
        "adapter": "lora", "lora_r": "rank", "lora_alpha": "alpha",
        "lora_target_modules": "targets", "lora_target_linear": "all_linear",
        "chat_template_kwargs": "template_variables", "peft_use_rslora": "rslora", "load_in_4bit": "four_bits",
        "load_in_8bit": "eight_bits", "sample_packing": "packing", "rpo_alpha": "sft_weight",
        "lora_model_dir": "start_adapter",
    },
    _TRAINER_DEFAULTS
    | {
        "micro_batch": 1, "epochs": 1, "schedule": "cosine", "max_length": 512, "warmup_fraction": 0.03,
        "most_warmup_steps": 100,
    },
    dpo={"beta": 0.1},
)  # fmt: skip
LLAMA_FACTORY = Tool(
    "LLaMA-Factory",
    _HUGGING_FACE
    | {
        "dataset": "train", "dataset_dir": "folder", "eval_dataset": "heldout", "max_samples": "max_rows",
        "cutoff_len": "max_length", "stage": "method", "pref_beta": "beta", "pref_loss": "loss",
        "finetuning_type": "lora", "lora_rank": "rank", "lora_alpha": "alpha", "lora_target": "targets",
        "use_rslora": "rslora", "quantization_bit": "bits", "packing": "packing", "neat_packing": "neat_packing",
        "pref_ftx": "sft_weight", "adapter_name_or_path": "start_adapter", "create_new_adapter": "new_adapter",
    },
    _TRAINER_DEFAULTS
    | {"learning_rate": 5e-5, "max_length": 2048, "lora": "lora", "rank": 8, "targets": "all", "folder": "data"},
    dpo={"beta": 0.1},
)  # fmt: skip

_MARKS = {
    "base_model": AXOLOTL,
    **dict.fromkeys(("stage", "finetuning_type", "cutoff_len", "dataset_dir", "template"), LLAMA_FACTORY),
    "model_name_or_path": TRL,
    "dataset_name": TRL,
}
"""Keys that only one tool has. The first key found decides."""
_DPO_OF_TRL = ("beta", "max_prompt_length", "max_completion_length", "precompute_ref_log_probs", "ref_model",
               "sync_ref_model", "rpo_alpha")  # fmt: skip
_DPO_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
               "aot", "aot_unpaired", "aot_pair", "discopop", "apo_zero", "apo_down")  # fmt: skip
_OTHER_METHODS = ("num_generations", "reward_funcs", "reward_model_path", "desirable_weight", "undesirable_weight",
                  "num_ppo_epochs", "simpo_gamma", "cpo_alpha", "lmbda", "center_rewards_coefficient",
                  "train_on_last_step_only", "step_separator")  # fmt: skip
"""Keys of TRL's other trainers, some of which also have ``beta`` or ``loss_type``."""
_OTHER_LOSSES = ("kto", "apo_zero_unpaired", "simpo", "grpo", "dr_grpo", "dapo", "bnpo")
"""Losses of TRL that neither SFT nor DPO has."""
_OTHER_TRAINERS = ("kto", "orpo", "grpo", "ppo", "cpo", "simpo", "gkd", "rloo", "bco", "reward", "prm")
_OTHER_MODELS = ("ForSequenceClassification", "ForTokenClassification")
_OTHER_ROWS = ("completion", "pretrain", "bradley_terry", "stepwise_supervised")
"""Axolotl's types of rows without a prompt, or without a response to learn."""
_ADVICE = {
    **dict.fromkeys(("val_set_size", "val_size"), "give data.heldout_fraction, or rows of their own as data.heldout"),
    **dict.fromkeys(
        ("template", "chat_template", "chat_template_jinja", "chat_template_path"),
        "the model's own chat template is taken; model.chat_template names a file with another",
    ),
    **dict.fromkeys(
        ("max_prompt_length", "max_completion_length"),
        "no row is cut here; rows longer than model.max_length are left out",
    ),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "weights are sharded over train.workers (train.sharding)"),
    "gradient_checkpointing": "train.gradient_checkpointing: auto decides by the card's memory",
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), "the human response alone is trained on"),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss", "roles_to_train", "mask_history"),
                    "the response that data.turns names is trained on, and nothing before it"),
}  # fmt: skip


def tool_of(config: Mapping[str, Any]) -> Tool | None:
    return next((tool for key, tool in _MARKS.items() if key in config), None)


def entries_of(config: Mapping[str, Any], tool: Tool) -> list[tuple[str, Any]]:
    """Returns keys and values; of two for one fact the tool reads the first. Axolotl's ``trl`` becomes ``trl.beta``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if tool is AXOLOTL and key == "trl" and isinstance(value, Mapping):
            flat |= {f"trl.{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    order = {key: number for number, key in enumerate(tool.keys)}
    return sorted(flat.items(), key=lambda entry: order.get(entry[0], len(order)))


def is_dpo_of_trl(config: Mapping[str, Any], file_name: str) -> bool:
    """Tells whether a TRL config is for DPO, not SFT. No key names the method."""
    return (
        any(key in config for key in _DPO_OF_TRL)
        or bool({*_losses_of(config)} & {*_DPO_LOSSES})
        or "dpo" in file_name.lower()
    )


def _losses_of(config: Mapping[str, Any]) -> list[str]:
    given = config.get("loss_type")
    return [str(loss) for loss in (given if isinstance(given, list) else [given])]


def other_method_of(config: Mapping[str, Any], file: Path, tool: Tool) -> str | None:
    """Returns what shows a method other than SFT and DPO; LLaMA-Factory's is named by its stage."""
    if tool is TRL:
        losses = [f"loss_type {loss}" for loss in _losses_of(config) if loss in _OTHER_LOSSES]
        keys = [key for key in _OTHER_METHODS if config.get(key) is not None]
        return next(iter(keys + losses), None) or _other_word(config, file)
    if tool is AXOLOTL:
        return next(_other_keys_of_axolotl(config), None)
    return None


def _other_word(config: Mapping[str, Any], file: Path) -> str | None:
    """Returns the other method named at the nearest place that names any; a name with sft or dpo, too, is theirs."""
    folder = file.absolute().parent
    named = [(key, config.get(key)) for key in ("output_dir", "hub_model_id", "run_name")]
    above = folder.parent.name if folder.parent.name.lower() in _OTHER_TRAINERS else None  # a project may study several
    for place, name in (("", file.name), ("its folder", folder.name), *named, (f"the folder {above}", above)):
        words = re.split(r"[^a-z]+", str(name or "").lower())
        if {"sft", "dpo"} & {*words}:
            return None
        if found := next((word for word in words if word in _OTHER_TRAINERS), None):
            return f"{found} in the name of {place}" if place else found
    return None


def _other_keys_of_axolotl(config: Mapping[str, Any]) -> Iterator[str]:
    yield from (key for key in ("reward_model", "process_reward_model", "pretraining_dataset") if config.get(key))
    if str(config.get("model_type")).endswith(_OTHER_MODELS):
        yield f"model_type {config['model_type']}"
    listed = config.get("datasets")
    for each in listed if isinstance(listed, list) else []:
        kind = each.get("type") if isinstance(each, Mapping) else None
        if isinstance(kind, str) and kind.partition(".")[0] in _OTHER_ROWS:
            yield f"datasets' type {kind}"


def reason_of(key: str) -> str:
    return _ADVICE.get(key, "has no equal here")
