"""Settings of a recipe from an SFT or DPO config of TRL, axolotl or LLaMA-Factory."""

import json
import re
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import yaml

from spin_ray.errors import ConfigError
from spin_ray.loop.init.foreign import Foreign
from spin_ray.loop.init.foreign_data import put_data
from spin_ray.loop.init.foreign_tools import (
    LLAMA_FACTORY,
    TRL,
    entries_of,
    is_dpo_of_trl,
    other_method_of,
    reason_of,
    tool_of,
)
from spin_ray.loop.init.settings import Setting

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}
_LOSSES = {"sigmoid": "logistic", "sigmoid_norm": "logistic", "hinge": "hinge"}
_OTHER_BETA = ("ipo", "sppo_hard", "orpo", "simpo", "kto_pair")
"""Losses whose β does not scale DPO's log-ratio. IPO and SPPO pull log-ratios to ±1/(2β)."""
_WHOLE_MODEL = (False, None, "full", "")
_ADAPTERS = (True, "lora", "qlora")
_NO_LIMIT = 1e6


def read_foreign(file: Path, gpus: int) -> Foreign:
    """Reads a foreign config.

    Raises:
        ConfigError: the file cannot be read, or is no SFT or DPO config of one of the three.
    """
    config = _load(file)
    tool = tool_of(config)
    if tool is None:
        raise ConfigError(
            f"{file}: is no SFT or DPO config of TRL (has model_name_or_path), axolotl (base_model) or "
            "LLaMA-Factory (stage)"
        )
    found = Foreign(file, tool, "sft", gpus)
    if other := other_method_of(config, file, tool):
        raise ConfigError(f"{file}: {other} is of another method; only sft and dpo can be read")
    for key, value in entries_of(config, tool):
        name = tool.keys.get(key)
        if value is None and name != "max_length":  # an empty key is no setting, but an empty max_length means no limit
            continue
        if name is None:
            found.left[key] = reason_of(key)
        elif name in found.given:
            earlier, taken = found.given[name]
            found.left[key] = f"says the same as {earlier}" if value == taken else f"{earlier} goes before it"
        else:
            found.given[name] = (key, value)
    found.method = _method(found, config)
    if found.method == "dpo":
        found.settings["algorithm"] = Setting("dpo", f"as in {file.name}; without this line: SPIN, on the chosen rows")
        found.settings["iterations"] = Setting(1, "one pass over the preferences; no opponent plays")
    _put_model(found)
    put_data(found)
    _put_lora(found)
    _put_training(found)
    for name, (key, _) in found.given.items():
        if name not in found.asked and name != "output":
            found.left.setdefault(key, "is not needed here")
    return found


def _load(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        config = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(config, Mapping):
        raise ConfigError(f"{file}: holds no settings, found {type(config).__name__}")
    return dict(config)


def _method(found: Foreign, config: Mapping[str, Any]) -> str:
    if found.tool is TRL:
        return "dpo" if is_dpo_of_trl(config, found.file.name) else "sft"
    method = found.fact("method") or "sft"
    if method == "ipo":  # axolotl's word for DPO with another loss
        found.leave("method", "the loss ipo has no equal here; logistic is taken")
        return "dpo"
    if method not in ("sft", "dpo"):
        raise ConfigError(f"{found.file}: {found.given['method'][0]} is {method}; only sft and dpo can be read")
    return method


def _put_model(found: Foreign) -> None:
    revision = found.fact("revision")
    at = f"@{revision}" if revision not in (None, "main") else ""
    found.put("model.path", "model", lambda name: f"{name}{at}")
    _put_start_adapter(found)
    found.put("model.max_length", "max_length", int)
    if found.fact("trusted"):
        found.put("model.trust_remote_code", "trusted", bool)
    found.put("model.chat_template_kwargs", "template_variables", dict)
    found.put("seed", "seed", int)


def _put_start_adapter(found: Foreign) -> None:
    """Makes an adapter that the training starts from the model, on the config's model as its base."""
    adapters = found.read("start_adapter", _names)
    if not adapters:
        return
    if len(adapters) > 1:
        raise ConfigError(
            f"{found.file}: {found.given['start_adapter'][0]} names {len(adapters)} adapters, and one can be merged "
            "here; merge them with your tool, and give the model by --model"
        )
    if found.fact("lora") not in _ADAPTERS:
        found.leave("start_adapter", "is read there with adapters alone, and all weights are trained")
        return
    if "model.path" in found.settings:
        found.settings["model.base"] = found.settings["model.path"]
    why = f"{found.why('start_adapter')}, merged with its base"
    if found.starts_below_its_adapter:
        why += "; DPO's reference there is the base alone, here the merged model"
    found.settings["model.path"] = Setting(adapters[0], why)


def _names(value: Any) -> list[str]:
    listed = value if isinstance(value, list) else str(value or "").split(",")
    return [name for each in listed if (name := str(each).strip())]


def _put_lora(found: Foreign) -> None:
    kind = found.fact("lora")
    if kind in _WHOLE_MODEL:
        return
    if kind not in _ADAPTERS:
        found.leave("lora", "has no equal here; all weights are trained")
        return
    _put_base(found, kind)
    found.put("train.lora.rank", "rank", int)
    rank = found.settings["train.lora.rank"].value if "train.lora.rank" in found.settings else 16
    if found.fact("alpha") is None:
        found.settings["train.lora.alpha"] = Setting(2 * rank, "twice the rank")
    found.put("train.lora.alpha", "alpha", int)
    if found.fact("rslora"):  # rsLoRA scales the change by alpha / √rank
        exact = found.settings["train.lora.alpha"].value * sqrt(rank)
        alpha = round(exact)
        found.settings["train.lora.alpha"] = Setting(alpha, f"times √{rank}: {found.why('rslora')}")
        if abs(alpha - exact) > 0.01 * exact:
            found.leave("rslora", f"the alpha of its scale is {exact:.4g}; whole ones only: {alpha}")
    if found.fact("all_linear"):
        found.settings["train.lora.target_modules"] = Setting("all-linear", found.why("all_linear"))
        found.leave("targets", "all linear layers have adapters")
    elif found.fact("targets") is not None:
        found.put("train.lora.target_modules", "targets", _targets)
        if "train.lora.target_modules" not in found.settings:
            found.leave("targets", "is a pattern of PEFT; every linear layer gets an adapter")
    else:
        found.settings["train.lora.target_modules"] = Setting(
            "all-linear", f"{found.tool.name} without a word: PEFT's choice, on most models [q_proj, v_proj]"
        )


def _put_base(found: Foreign, kind: Any) -> None:
    key = next((key for key in ("four_bits", "eight_bits") if found.fact(key)), "bits")
    base = {"four_bits": "nf4", "eight_bits": "int8"}.get(key) or {4: "nf4", 8: "int8"}.get(found.fact("bits"))
    if base:
        found.settings["train.lora.base"] = Setting(base, found.why(key))
        found.settings["train.lora.merge"] = Setting(False, "a run commits adapters on quantised weights as they are")
    elif kind == "qlora":
        found.leave("lora", "names no bits; the frozen weights are in bf16 (train.lora.base: nf4 or int8)")
    else:
        found.leave("bits", "has no equal here; the frozen weights are in bf16")


def _targets(value: Any) -> Any:
    if value in ("all", "all-linear", ["all-linear"]):
        return "all-linear"
    if isinstance(value, str) and not re.fullmatch(r"[\w., ]+", value):  # a pattern of PEFT
        return None
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else [str(name) for name in value]


def _put_training(found: Foreign) -> None:
    stage = found.stage
    devices = max(1, found.gpus)
    batch = found.read("micro_batch", int) * found.read("accumulation", int) * devices
    why = f"{found.why('micro_batch', 'accumulation')} × {devices} device{'s' * (devices > 1)}"
    if found.packs:
        found.leave("packing", f"a step there is {batch} packs of several rows each ({found.batch_place} counts rows)")
        found.leave("neat_packing", f"as packing: {found.batch_place} counts rows")
    found.settings[found.batch_place] = Setting(batch, why)
    if stage == "sft" and "train.lora.rank" in found.settings:
        found.leave("learning_rate", "is for adapters; the warm-up trains all weights (sft.learning_rate)")
    else:
        found.put(f"{stage}.learning_rate", "learning_rate", float)
    found.put(f"{stage}.epochs", "epochs", lambda count: max(1, round(float(count))))
    if found.read("epochs", float) != found.settings[f"{stage}.epochs"].value:
        found.leave("epochs", f"whole passes only: {found.settings[f'{stage}.epochs'].value}")
    if found.max_steps:
        found.leave("max_steps", f"ends the training there; here {stage}.epochs does")
    _put_optimizer(found, f"{stage}.optimizer")
    _put_precision(found)
    if stage == "train":
        _put_objective(found)
    elif found.tool is TRL and found.fact("loss") not in (None, "nll", "chunked_nll"):
        found.leave("loss", "the warm-up maximises the likelihood of the responses (nll)")


def _put_objective(found: Foreign) -> None:
    weights = _weights_of_losses(found)
    main = _loss_of_pairs(weights)
    found.put("objective.loss", "loss", lambda _: _LOSSES.get(main))
    if main == "sigmoid_norm":
        found.settings["objective.length_normalised"] = Setting(True, found.why("loss"))
    others = _OTHER_BETA if main else (*_OTHER_BETA, "sigmoid_norm")
    if other := next((name for name in weights if name in others), None):
        found.leave("beta", f"is another quantity in the loss {other}")
    else:
        found.put("objective.beta", "beta", float)
    _put_sft_weight(found, weights, main)


def _weights_of_losses(found: Foreign) -> dict[str, float]:
    """Returns the weight of each loss in the sum that is minimised."""
    given = "ipo" if found.fact("method") == "ipo" else found.fact("loss") or "sigmoid"
    names = [str(name) for name in given] if isinstance(given, list) else [str(given)]

    def read(weights: Any) -> dict[str, float]:
        return dict(zip(names, [1.0] * len(names) if weights is None else map(float, weights), strict=True))

    return found.read("loss_weights", read)


def _loss_of_pairs(weights: Mapping[str, float]) -> str:
    """Returns the loss that stands alone or beside ``sft``; empty if it has no equal here."""
    names = [name for name in weights if name != "sft"]
    return names[0] if len(names) == 1 and names[0] in _LOSSES and weights[names[0]] > 0 else ""


def _put_sft_weight(found: Foreign, weights: Mapping[str, float], main: str) -> None:
    per = "row" if found.tool is LLAMA_FACTORY else "micro-batch"
    place, mean = "objective.sft_weight", f"the mean of the means per {per} there, over all tokens of a step here"
    if found.fact("sft_weight"):
        found.settings[place] = Setting(found.read("sft_weight", float), f"{found.why('sft_weight')}: {mean}")
    if not main:
        found.leave("loss_weights", "belongs to losses without an equal here")
        return
    if weights.get("sft"):
        why = found.why("loss_weights" if "loss_weights" in found.given else "loss")
        found.settings[place] = Setting(float(f"{weights['sft'] / weights[main]:.4g}"), f"{why}: {mean}")
    if weights[main] != 1:
        found.leave("loss_weights", f"{main} has 1 here, which matters to max_grad_norm alone")


def _put_optimizer(found: Foreign, place: str) -> None:
    found.put(f"{place}.name", "optimizer", _optimizer)
    if "8bit" in str(found.fact("optimizer")) or "paged" in str(found.fact("optimizer")):
        found.leave("optimizer", "the state has 32 bits here and is not paged; adamw_8bit is there for one worker")
    found.put(f"{place}.weight_decay", "weight_decay", float)
    found.put(f"{place}.max_grad_norm", "max_grad_norm", lambda norm: float(norm) or _NO_LIMIT)
    if "beta1" in found.given or "beta2" in found.given:
        pair = [
            found.read("beta1", lambda beta: float(beta or 0.9)),
            found.read("beta2", lambda beta: float(beta or 0.999)),
        ]
        found.settings[f"{place}.betas"] = Setting(pair, found.why("beta1", "beta2"))
    found.put(f"{place}.eps", "eps", float)
    found.put(f"{place}.schedule", "schedule", lambda name: _SCHEDULES.get(str(name)))
    steps = found.warmup_steps
    if found.fact("schedule") == "constant":
        found.settings[f"{place}.warmup_fraction"] = Setting(0.0, "a constant learning rate has no warm-up there")
        found.leave("warmup_steps", "is not read there with a constant learning rate")
    elif steps < 1 and "warmup_steps" in found.given and not (steps == 0 and "warmup_fraction" in found.given):
        found.put(f"{place}.warmup_fraction", "warmup_steps", float)
    elif steps >= 1:
        found.leave("warmup_steps", f"{place}.warmup_fraction is {steps:g} / all steps of one training")
    else:
        found.put(f"{place}.warmup_fraction", "warmup_fraction", float)


_ADAMW = re.compile(
    r"adamw(_torch|_hf|_apex|_anyprecision)?(_fused|_xla|_npu_fused)?(_4bit|_8bit)?"
    r"|(paged_)?adamw(_bnb)?_(8|32)bit"
)
_RMSPROP = re.compile(r"rmsprop(_bnb)?(_8bit|_32bit)?")


def _optimizer(name: Any) -> str | None:
    """Returns the optimizer with the same update, or None, as for ``galore_adamw``."""
    text = str(name).lower()
    return "adamw" if _ADAMW.fullmatch(text) else "rmsprop" if _RMSPROP.fullmatch(text) else None


def _put_precision(found: Foreign) -> None:
    bf16, fp16 = found.fact("bf16"), found.fact("fp16")
    if fp16:
        found.leave("fp16", "is not computed here; train.precision: auto takes bf16 where it is fast")
    elif bf16 is True and not found.gpus:
        found.leave("bf16", "is for GPUs; train.precision: auto takes what is faster on this CPU")
    elif bf16 is True:
        found.settings["train.precision"] = Setting("bf16", found.why("bf16"))
    elif bf16 is False:
        found.settings["train.precision"] = Setting("fp32", found.why("bf16"))
