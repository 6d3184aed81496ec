"""What is compared: recipes that differ in nothing but the arm, on one of three settings.

A setting says model, data and sizes. An arm changes some values of the setting's recipe. Every arm but
self-reinforcement starts from the setting's θ_0, which the arm ``warm_up`` makes once per seed.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WARM_UP = "warm_up"
SFT = "continued_sft"
"""More SFT at the warm-up's learning rate; names of its variants start with it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where the experiment runs."""

    name: str
    train: str
    test: str
    """File names below the data folder, or ``embedded:`` names."""
    recipe: dict[str, Any]
    warm_up_epochs: int
    """To the plateau of the held-out log p(y), on rows of *train* that were kept back."""
    dev_rows: int = 300
    """Rows of train that the search measures on, and does not train on."""
    seed_rows: int = 500
    """Labelled rows that self-reinforcement may see."""
    extractor: str = "equals"
    most_iterations: int | None = None
    """Cuts every arm short: for a setting whose numbers mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    """Laid over the setting's recipe, section by section."""
    from_base: bool = False
    """Starts from the model before the warm-up, with a warm-up of its own."""
    is_spin: bool = False
    """One of those of which the best on the dev rows is compared with continued SFT."""


def spin(name: str, iterations: int = 3, rate: float = 3e-6, **objective: Any) -> Arm:
    """SPIN on slices with fresh y', β 1 and an anchor unless said otherwise."""
    values = {"beta": 1.0, "window": 1, "sft_weight": 0.3} | objective
    changes = {"objective": values, "iterations": iterations, "train": {"learning_rate": rate}}
    return Arm(name=name, changes=changes, is_spin=True)


ARMS = [
    Arm(
        name=WARM_UP,
        from_base=True,
        changes={"algorithm": SFT, "iterations": 1, "data": {"prompts_per_iteration": None}},
    ),
    # Enough of it to cover the tokens and the time of every SPIN arm; each iterate is measured.
    Arm(name=SFT, changes={"algorithm": SFT, "iterations": 9}),
    Arm(name=f"{SFT}_low_rate", changes={"algorithm": SFT, "iterations": 9, "train": {"learning_rate": 2e-6}}),
    spin("spin"),
    spin("alpha_spin", reference_alpha=0.9),
    spin("fictitious_play", window="all"),
    Arm(
        name="self_reinforcement",
        from_base=True,
        changes={
            "algorithm": "self_reinforcement", "iterations": 2, "generation": {"samples_per_prompt": 4},
            "objective": {"beta": 1.0, "window": 1, "sft_weight": 0.3}, "self_filter": {"min_agreement": 0.5},
        },
    ),
]  # fmt: skip

SEARCH = [
    spin(f"spin_beta_{beta:g}_rate_{rate:g}_anchor_{anchor:g}", rate=rate, beta=beta, sft_weight=anchor)
    for beta, rate, anchor in [
        (1.0, 1e-6, 0.0), (1.0, 3e-6, 0.0), (1.0, 3e-6, 1.0), (2.0, 3e-6, 0.3), (5.0, 3e-6, 0.3), (5.0, 5e-6, 1.0),
    ]
]  # fmt: skip
"""Measured on dev rows only, beside ``ARMS``: the search, what did not work included."""

_CPU = {
    # An arm that destroys the model is a finding: it is measured, not stopped.
    "health": {"max_margin": None, "max_real_logp_drop": None, "max_length_change": None},
    "generation": {
        "resources": {"cpus": 2}, "engine": {"enforce_eager": True, "max_num_seqs": 128, "cpu_kv_cache_gib": 2},
    },
    "train": {
        "workers": 2, "resources": {"cpus": 1}, "epochs": 1, "global_batch_pairs": 24, "pack_length": 512,
        "precision": "fp32", "checkpoint_every_steps": 20, "learning_rate": 2e-5,
        "optimizer": {"name": "adamw", "schedule": "linear"},
    },
}  # fmt: skip


def _smollm2(max_length: int, max_tokens: int, prompts: int) -> dict[str, Any]:
    recipe = copy.deepcopy(_CPU)
    recipe["model"] = {"path": "embedded:smollm2-135m-instruct", "max_length": max_length}
    recipe["data"] = {"system": "", "prompts_per_iteration": prompts}
    recipe["generation"] |= {"sampling": {"max_tokens": max_tokens}, "shard_rows": 264}
    recipe["train"]["pack_length"] = max(512, max_length + max_tokens)
    return recipe


def _smoke() -> dict[str, Any]:
    recipe = copy.deepcopy(_CPU)
    recipe["model"] = {"path": "embedded:tiny-llama", "max_length": 96}
    recipe["data"] = {"prompts_per_iteration": 16}
    recipe["generation"] |= {"sampling": {"max_tokens": 16}, "shard_rows": 64, "resources": {"cpus": 1}}
    recipe["generation"]["engine"] |= {"max_num_seqs": 16, "cpu_kv_cache_gib": 1, "dtype": "float32"}
    recipe["train"] |= {"workers": 1, "global_batch_pairs": 4, "pack_length": 128}
    return recipe


SETTINGS = {
    "word_problems": Setting(
        name="word_problems", train="word_problems.train.jsonl", test="word_problems.test.jsonl",
        recipe=_smollm2(max_length=256, max_tokens=48, prompts=528), warm_up_epochs=4,
    ),
    "gsm8k": Setting(
        name="gsm8k", train="gsm8k.train.jsonl", test="gsm8k.test.jsonl", extractor="hashes",
        recipe=_smollm2(max_length=768, max_tokens=256, prompts=528), warm_up_epochs=3,
    ),
    "smoke": Setting(
        name="smoke", train="embedded:arithmetic-train", test="embedded:arithmetic-heldout", recipe=_smoke(),
        warm_up_epochs=1, dev_rows=16, seed_rows=24, most_iterations=1,
    ),
}  # fmt: skip


def recipe_of(setting: Setting, arm: Arm, data: dict[str, str], start: str | None, seed: int) -> dict[str, Any]:
    """The recipe of a run.

    Args:
        data: files by role: ``train``, ``heldout``, and for self-reinforcement ``seed`` and ``questions``.
        start: θ_0's folder; None for arms that start from the base model.
    """
    recipe = _laid_over(setting.recipe, arm.changes)
    recipe["iterations"] = min(recipe["iterations"], setting.most_iterations or recipe["iterations"])
    recipe |= {"seed": seed, "evaluation": {"answer_extractor": setting.extractor}}
    recipe["data"] |= {"train": data["train"], "heldout": data["heldout"]}
    if start is not None:
        recipe["model"]["path"] = start
    if arm.name == WARM_UP:
        recipe["train"]["epochs"] = setting.warm_up_epochs
    elif arm.from_base:
        recipe["data"] |= {"train": data["seed"], "questions": data["questions"]}
        batch = recipe["train"]["global_batch_pairs"]
        recipe["sft"] = {"epochs": setting.warm_up_epochs, "learning_rate": 2e-5, "global_batch_rows": batch}
    if arm.is_spin or arm.name == "self_reinforcement":
        recipe["train"] |= {"optimizer": {"name": "rmsprop", "schedule": "linear"}}
        recipe["train"]["learning_rate"] = arm.changes.get("train", {}).get("learning_rate", 3e-6)
    return recipe


def _laid_over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for name, value in changes.items():
        merged[name] = merged.get(name, {}) | value if isinstance(value, dict) else value
    return merged


def split_files(setting: Setting, train: Path, test: Path, split: str, folder: Path) -> dict[str, str]:
    """Files by role. ``dev`` trains without the last ``dev_rows`` rows of train and measures on them; ``test`` trains
    on all of train and measures on test, which nothing is chosen on.
    """
    rows = train.read_text().splitlines()
    measured = test.read_text().splitlines()
    if split == "dev":
        rows, measured = rows[: -setting.dev_rows], rows[-setting.dev_rows :]
    if setting.name == "smoke":
        rows, measured = rows[:64], measured[: setting.dev_rows]
    parts = {
        "train": rows, "heldout": measured, "seed": rows[: setting.seed_rows], "questions": rows[setting.seed_rows :],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for role, lines in parts.items():
        path = folder / f"{role}.jsonl"
        path.write_text("".join(json.dumps(json.loads(line)) + "\n" for line in lines))
        files[role] = str(path.absolute())
    return files
