"""Arms and settings of the quality experiment. A setting has model, data and sizes; an arm changes its recipe.

The arm ``warm_up`` makes θ_0: SFT until held-out human responses get no likelier (``plateau``). All arms start at θ_0
except self-reinforcement and those with ``after_sft``; a seed is an order of rows and a stream of samples.

With fresh y′ of θ_t itself, E[∇ log p(y′)] = 0: the first step of SPIN is a noisy step of SFT. SPIN differs later in an
iteration, when y′ is stale. A flat opponent, which samples at temperature T > 1 from its likeliest tokens, differs at
once: the fixed point of log p_{t+1} = log p_t + (log p_data − log p_opponent)/β is p ∝ p_data^T. It takes more than ten
steps: hence long iterations, with a heavier weight on log p(y).
"""

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

WARM_UP = "warm_up"
SFT = "continued_sft"
"""More SFT from θ_0; names of its variants start with it."""
SELF_REINFORCEMENT = "self_reinforcement"
BUDGETS = {"train_tokens": "training tokens", "compute": "computed tokens", "seconds": "wall time"}
"""Costs since θ_0 by which arms are compared: names in an iterate's JSON, and in words."""
Recipe = dict[str, Any]
Run = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    name: str
    train: str
    test: str
    """File names below the data folder, or ``embedded:`` names."""
    recipe: Recipe
    warm_up_rates: tuple[float, ...]
    """Peak learning rate of each epoch of the warm-up; it falls to 0 in each."""
    dev_rows: int = 300
    """Last rows of train, for all choices; never trained on."""
    train_rows: int | None = None
    """None: all others."""
    test_rows: int | None = None
    """First rows of test that are measured; None: all."""
    seed_rows: int = 500
    question_rows: int = 480
    """Rows whose question self-reinforcement sees: the base model answers each four times."""
    extractor: str = "equals"
    most_iterations: int | None = None
    arms: tuple[str, ...] | None = None
    """Arms that run here; None: all."""
    most_seeds: int | None = None
    cooler: tuple[float, ...] = (0.67, 0.5)
    """Further temperatures at which ``COOLER_ITERATES`` are sampled."""
    temperatures: tuple[float, ...] = ()
    """Temperatures of replies that are compared with people's. Empty: answers are graded."""
    own_arms: tuple["Arm", ...] = ()
    """Arms of this setting alone. Empty: ``ARMS``."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    name: str
    why: str
    changes: Recipe = field(default_factory=dict)
    from_base: bool = False
    """True: starts from the model before the warm-up, with its own warm-up."""
    after_sft: int | None = None
    """Iterate of continued SFT (same seed) from which the arm starts, and whose cost it bears. None: θ_0."""
    is_spin: bool = False
    """True: the best of these arms on dev rows is compared with continued SFT."""
    seeds: int = 1


def more_sft(name: str, rate: float, why: str, iterations: int = 8, seeds: int = 1) -> Arm:
    changes = {
        "algorithm": SFT, "iterations": iterations, "data": {"prompts_per_iteration": 528},
        "train": {"learning_rate": rate, "global_batch_pairs": 24},
    }  # fmt: skip
    return Arm(name=name, why=why, changes=changes, seeds=seeds)


def spin(
    name: str,
    why: str,
    *,
    rate: float = 2e-5,
    flat: float | None = None,
    seeds: int = 1,
    iterations: int = 3,
    prompts: int = 240,
    samples: int = 2,
    **objective: Any,
) -> Arm:
    """Returns an arm of SPIN with fresh y′, by default in short iterations (10 steps for 240 prompts).

    Args:
        flat: temperature of an opponent that draws from its 8 likeliest tokens.
    """
    changes: Recipe = {
        "objective": {"beta": 1.0, "window": 1, "sft_weight": 3.0, "keep_identical": True} | objective,
        "iterations": iterations,
        "data": {"prompts_per_iteration": prompts},
        "train": {"learning_rate": rate, "global_batch_pairs": 48},
        "generation": {"samples_per_prompt": samples},
    }
    if flat is not None:
        changes["generation"] |= {"sampling": {"temperature": flat, "top_k": 8}}
    return Arm(name=name, why=why, changes=changes, is_spin=True, seeds=seeds)


def long_spin(
    name: str,
    why: str,
    *,
    anchor: float,
    flat: float = 1.5,
    seeds: int = 1,
    iterations: int = 1,
    prompts: int = 1700,
    after_sft: int | None = None,
) -> Arm:
    """Returns an arm with 36 steps an iteration, on nearly all prompts with one y′ each, and β = ½."""
    arm = spin(
        name, why, rate=3e-5, flat=flat, seeds=seeds, iterations=iterations, prompts=prompts, samples=1, beta=0.5,
        sft_weight=anchor,
    )  # fmt: skip
    return replace(arm, after_sft=after_sft)


ARMS = [
    Arm(
        name=WARM_UP, why="θ_0: SFT, an epoch an iterate, to the plateau of held-out log p(y)", from_base=True,
        changes={"algorithm": SFT, "data": {"prompts_per_iteration": None}},
    ),
    more_sft(SFT, 2e-5, "the baseline", seeds=3),
    spin("spin_flat_1.5", "opponent at temperature 1.5", flat=1.5),
    spin("spin", "the paper's opponent, with the anchor", seeds=3),
    more_sft(f"{SFT}_rate_5e-5", 5e-5, "the baseline at the warm-up's last rate", iterations=4),
    spin("spin_flat_1.5_rate_5e-5", "at 2e-5 the margin moved by 0.2 nats", flat=1.5, rate=5e-5, iterations=1),
    spin(
        "spin_flat_2_beta_0.3", "sharper by design: log-ratios go on to 1/β, over more steps", flat=2.0, beta=0.3,
        sft_weight=1.0, prompts=528, iterations=1,
    ),
    long_spin("spin_flat_1.5_long", "one iteration over nearly all prompts, nearly solved: exponent 1.67", anchor=1.0),
    long_spin(
        "spin_flat_1.5_long_anchor_5", "the same, held on y: without that greedy answers became worse", anchor=5.0,
        iterations=2, seeds=3,
    ),
    long_spin("spin_flat_1.5_long_anchor_10", "twice that anchor", anchor=10.0),
    long_spin("spin_flat_2_long_anchor_5", "β = 1/T: one iteration goes to the fixed point", anchor=5.0, flat=2.0),
    long_spin(
        "spin_flat_1.5_after_sft", "the long iteration after as many tokens of SFT, where SFT helps least", anchor=5.0,
        after_sft=4,
    ),
    long_spin(
        "spin_flat_2_after_sft", "half as many steps with T = 2 from there: sharpness for fewer tokens", anchor=5.0,
        flat=2.0, prompts=850, after_sft=4,
    ),
    spin("spin_no_anchor", "the paper's objective", sft_weight=0.0),
    spin("spin_beta_5", "strongly regularised", beta=5.0, iterations=1),
    spin("alpha_spin", "geometric reference", reference_alpha=0.9),
    spin("fictitious_play", "every iterate so far is an opponent", window="all"),
    Arm(
        name=SELF_REINFORCEMENT, why="few labelled rows, the other questions unlabelled", from_base=True,
        changes={
            "algorithm": SELF_REINFORCEMENT, "iterations": 2, "self_filter": {"min_agreement": 0.5},
            "data": {"prompts_per_iteration": 240}, "generation": {"samples_per_prompt": 4},
            "objective": {"beta": 1.0, "window": 1, "sft_weight": 3.0},
            "train": {"learning_rate": 2e-5, "global_batch_pairs": 24},
        },
    ),
]  # fmt: skip
"""Arms in the order in which they run: each result says something without the next."""
COOLER_ITERATES = {WARM_UP: None, SFT: 4, "spin_flat_1.5_long_anchor_5": 1}
"""Iterates of seed 0 that are also sampled at a setting's ``cooler`` temperatures; None: θ_0."""

CPU: Recipe = {
    # An arm that destroys the model is a finding: it is measured, not stopped.
    "health": {"max_margin": None, "max_real_logp_drop": None, "max_length_change": None},
    "generation": {
        "resources": {"cpus": 1},
        # Not bf16, which would round an iteration's small updates away before they play.
        "engine": {"enforce_eager": True, "max_num_seqs": 128, "cpu_kv_cache_gib": 1, "dtype": "float32"},
    },
    # One thread: more of them than free cores slow a step more than tenfold.
    "train": {
        "workers": 1, "resources": {"cpus": 1}, "epochs": 1, "global_batch_pairs": 24, "pack_length": 2048,
        "precision": "bf16", "checkpoint_every_steps": 15, "optimizer": {"name": "adamw", "schedule": "linear"},
    },
    "objective": {"window": 1},
    # The run's own evaluation is there for the distance; measure.py measures on all rows.
    "evaluation": {"max_rows": 100},
}  # fmt: skip


def _smollm2(max_length: int, max_tokens: int) -> Recipe:
    recipe = copy.deepcopy(CPU)
    recipe["model"] = {"path": "embedded:smollm2-135m-instruct", "max_length": max_length}
    recipe["data"] = {"system": ""}
    recipe["generation"] |= {"sampling": {"max_tokens": max_tokens}, "shard_rows": 264}
    return recipe


def _smoke() -> Recipe:
    recipe = copy.deepcopy(CPU)
    recipe["model"] = {"path": "embedded:tiny-llama", "max_length": 96}
    recipe["data"] = {"system": ""}
    recipe["generation"] |= {"sampling": {"max_tokens": 16}, "shard_rows": 64}
    recipe["generation"]["engine"] |= {"max_num_seqs": 16}
    recipe["train"] |= {"pack_length": 128, "precision": "fp32"}
    recipe["evaluation"] = {"max_rows": 8}
    return recipe


SETTINGS = {
    "word_problems": Setting(
        name="word_problems", train="word_problems.train.jsonl", test="word_problems.test.jsonl",
        recipe=_smollm2(max_length=256, max_tokens=48), warm_up_rates=(1e-4, 1e-4, 5e-5, 5e-5, 2e-5),
    ),
    "gsm8k": Setting(
        name="gsm8k", train="gsm8k.train.jsonl", test="gsm8k.test.jsonl", extractor="hashes",
        recipe=_smollm2(max_length=768, max_tokens=256), warm_up_rates=(1e-4, 5e-5, 2e-5),
        # An answer is ten times as long as an equation; all rows and arms would be days.
        dev_rows=60, train_rows=800, test_rows=60, most_iterations=3, most_seeds=1, cooler=(),
        arms=(WARM_UP, SFT, "spin"),
    ),
    "smoke": Setting(
        name="smoke", train="embedded:arithmetic-train", test="embedded:arithmetic-heldout", recipe=_smoke(),
        warm_up_rates=(1e-4,), dev_rows=16, train_rows=64, test_rows=16, seed_rows=24, most_iterations=1,
    ),
}  # fmt: skip


def arms_of(setting: Setting) -> list[Arm]:
    return [
        replace(arm, seeds=min(arm.seeds, setting.most_seeds or arm.seeds))
        for arm in setting.own_arms or ARMS
        if setting.arms is None or arm.name in setting.arms
    ]


def iterations_of(setting: Setting, arm: Arm) -> int:
    wanted = len(setting.warm_up_rates) if arm.name == WARM_UP else arm.changes["iterations"]
    return min(wanted, setting.most_iterations or wanted)


def is_finished(setting: Setting, arm: Arm, run: Run | None) -> bool:
    return run is not None and run["complete"] and run["recipe"]["iterations"] >= iterations_of(setting, arm)


def recipe_of(setting: Setting, arm: Arm, data: dict[str, str], start: str | None, seed: int) -> Recipe:
    """Returns the recipe of a run.

    Args:
        data: files by role: ``train``, ``dev``, and for self-reinforcement ``seed`` and ``questions``.
        start: θ_0's folder; None for arms that start from the base model.
    """
    recipe = _laid_over(setting.recipe, arm.changes)
    rates = list(setting.warm_up_rates)
    if arm.name == WARM_UP:
        recipe["train"]["learning_rate"] = rates
    recipe["iterations"] = iterations_of(setting, arm)
    recipe["seed"] = seed
    recipe["evaluation"]["answer_extractor"] = setting.extractor
    recipe["data"] |= {"train": data["train"]}
    if not (setting.temperatures and recipe["algorithm"] == SFT):  # replies to dev rows are measured apart
        recipe["data"]["heldout"] = data["dev"]
    if start is not None:
        recipe["model"]["path"] = start
    if arm.name == SELF_REINFORCEMENT:
        recipe["data"] |= {"train": data["seed"], "questions": data["questions"]}
        recipe["sft"] = {"epochs": len(rates), "learning_rate": rates[0], "global_batch_rows": 24}
    if setting.name == "smoke":
        recipe["train"]["global_batch_pairs"] = 8
        recipe["data"]["prompts_per_iteration"] = 16
    return recipe


def plateau(warm_up: Run) -> int:
    """Returns the iterate after which human responses to dev rows get no likelier: θ_0.

    Example: log p(y) of −20, −18, −19 for θ_1 to θ_3 gives 2.
    """
    iterates = warm_up["iterates"]
    best = iterates[0]
    for iterate in iterates[1:]:
        if sum(iterate["dev"]["real_logp"]) <= sum(best["dev"]["real_logp"]):
            break
        best = iterate
    return best["iterate"]


def numbered(run: Run, number: int | None) -> dict[str, Any] | None:
    """Returns the measures of an iterate; None if it was not made."""
    return next((each for each in run["iterates"] if each["iterate"] == number), None)


def _laid_over(base: Recipe, changes: Recipe) -> Recipe:
    merged = copy.deepcopy(base)
    for name, value in changes.items():
        merged[name] = _laid_over(merged.get(name, {}), value) if isinstance(value, dict) else copy.deepcopy(value)
    return merged


def json_lines(file: Path) -> list[str]:
    """Returns the lines of a JSONL file; ``str.splitlines`` also splits at U+2028 and U+0085 within a text."""
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def split_files(setting: Setting, train: Path, test: Path, folder: Path) -> dict[str, str]:
    """Writes files by role. No arm trains on ``dev``, the last rows of train; nothing is chosen on ``test``."""
    rows, measured = json_lines(train), json_lines(test)[: setting.test_rows]
    rows, dev = rows[: -setting.dev_rows], rows[-setting.dev_rows :]
    chosen_by = {json.loads(row).get("conversation_id") for row in dev} - {None}
    rows = [row for row in rows if json.loads(row).get("conversation_id") not in chosen_by][: setting.train_rows]
    parts = {
        "train": rows, "dev": dev, "test": measured, "seed": rows[: setting.seed_rows],
        "questions": rows[setting.seed_rows :][: setting.question_rows],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for role, lines in parts.items():
        path = folder / f"{role}.jsonl"
        path.write_text("".join(json.dumps(json.loads(line)) + "\n" for line in lines))
        files[role] = str(path.absolute())
    return files
