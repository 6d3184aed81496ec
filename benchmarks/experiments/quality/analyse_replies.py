"""How well do discriminators tell replies from people's (0.5: not at all)?

Iterate and temperature are chosen on dev conversations and reported on test conversations. Continued SFT has its own
best temperature, at its first iterate with at least as many training tokens. Iterates of more tokens than any of
continued SFT are no choice.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import SFT, WARM_UP, Run, arms_of, is_finished, iterations_of, numbered, plateau
from intervals import bootstrap
from likeness import DISCRIMINATORS
from replies import FIRST_PASS_OF, SETTINGS

MEASURE = "accuracy of discriminators"
TARGET = -0.02
Runs = dict[str, dict[int, Run]]
Choice = tuple[int, str]


def shared(runs: Iterable[Run]) -> tuple[str, ...]:
    """Returns the discriminators that every measured iterate has, at each temperature."""
    found = [
        at["told"]
        for run in runs for each in run["iterates"] if "test" in each
        for split in ("dev", "test") for at in each[split]["at"].values()
    ]  # fmt: skip
    return tuple(name for name in DISCRIMINATORS if all(each.get(name) for each in found))


def told(iterate: dict[str, Any], split: str, temperature: str, by: Sequence[str]) -> np.ndarray:
    """Returns for each conversation the fraction told right, a mean of the discriminators ``by``."""
    found = iterate[split]["at"][temperature]["told"]
    return np.mean([found[name] for name in by], axis=0)


def choices(runs: dict[int, Run], least_tokens: dict[int, float] | None = None) -> list[Choice]:
    """Returns iterates and temperatures that all seeds have.

    Args:
        least_tokens: by seed; only the first iterate with as many training tokens is a choice.
    """
    found: list[set[Choice]] = []
    for seed, run in runs.items():
        measured = [each for each in run["iterates"] if "test" in each]
        if least_tokens is not None:
            measured = [each for each in measured if each["train_tokens"] >= least_tokens[seed]][:1]
        found.append({(each["iterate"], name) for each in measured for name in each["dev"]["at"]})
    return sorted(set.intersection(*found)) if found else []


def on(runs: dict[int, Run], choice: Choice, split: str, by: Sequence[str]) -> np.ndarray:
    """Returns fractions told right, [seeds, conversations]."""
    number, temperature = choice
    return np.stack([told(numbered(run, number) or {}, split, temperature, by) for run in runs.values()])


def best(runs: dict[int, Run], among: list[Choice], by: Sequence[str]) -> Choice | None:
    return min(among, key=lambda choice: float(on(runs, choice, "dev", by).mean()), default=None)


def against_sft(arm: dict[int, Run], sft: dict[int, Run], by: Sequence[str]) -> dict[str, Any] | None:
    """Returns the arm's best minus continued SFT's best, with the same seeds; None while either is missing.

    Args:
        by: discriminators, the same for all arms that are compared.
    """
    seeds = sorted(arm.keys() & sft.keys())
    mine, theirs = ({seed: runs[seed] for seed in seeds} for runs in (arm, sft))
    matched = {choice: others for choice in choices(mine) if (others := _as_long(mine, choice[0], theirs))}
    chosen = best(mine, [*matched], by) if by else None
    if chosen is None or (other := best(theirs, matched[chosen], by)) is None:
        return None
    values = on(mine, chosen, "test", by) - on(theirs, other, "test", by)
    return {
        **bootstrap(values), "seeds": seeds, "iterate": chosen[0], "temperature": chosen[1],
        "sft_iterate": other[0], "sft_temperature": other[1],
        "on_dev": float(on(mine, chosen, "dev", by).mean()),
    }  # fmt: skip


def beyond(arm: dict[int, Run], sft: dict[int, Run]) -> list[int]:
    """Returns the arm's iterates that have more training tokens than any iterate of continued SFT."""
    return sorted({number for number, _ in choices(arm) if not _as_long(arm, number, sft)})


def _as_long(arm: dict[int, Run], number: int, sft: dict[int, Run]) -> list[Choice]:
    """Returns the choices of continued SFT at as many training tokens as iterate ``number`` of an arm."""
    seeds = arm.keys() & sft.keys()
    spent = {seed: (numbered(arm[seed], number) or {})["train_tokens"] for seed in seeds}
    return choices({seed: sft[seed] for seed in sorted(seeds)}, spent)


def table_row(run: Run, iterate: dict[str, Any], temperature: str) -> dict[str, Any]:
    measured = iterate["test"]
    at = measured["at"][temperature]
    row = {"arm": run["arm"], "seed": run["seed"], "iterate": iterate["iterate"], "temperature": temperature}
    row |= {name: float(np.mean(at["told"][name])) if at["told"].get(name) else None for name in DISCRIMINATORS}
    row |= {name: at.get(name) for name in ("mauve", *_OF_TOKENS, "self_bleu")}
    row["people_self_bleu"] = measured["self_bleu"]
    row["logp"] = sum(measured["real_logp"]) / sum(measured["real_tokens"])
    return row | {"train_tokens": iterate["train_tokens"]}


_OF_TOKENS = (
    "generated_length", "real_length", "length_distance", "cut", "distinct_1", "distinct_2", "real_distinct_2",
)  # fmt: skip


def load(folder: Path) -> Runs:
    """Reads the runs of a folder by arm and seed.

    Raises:
        SystemExit: arms start from different models, as machines may choose another plateau of the warm-up.
    """
    runs: Runs = {}
    starts: dict[str | None, str] = {}
    for file in sorted(folder.glob("*.json")):
        run = json.loads(file.read_text())
        runs.setdefault(run["arm"], {})[run["seed"]] = run
        if run["arm"] != WARM_UP:
            starts[run["recipe"].get("model", {}).get("path")] = f"{run['arm']}, seed {run['seed']}"
    if len(starts) > 1:
        told = "; ".join(f"{path} ({run})" for path, run in starts.items())
        raise SystemExit(f"{folder}: the arms start from different models: {told}; compare each start by itself")
    return runs


def analyse(results: Path, setting: str) -> dict[str, Any]:
    """Returns the content of quality_replies.json, from the first pass while the whole setting has no run."""
    shown = setting
    if not load(results / setting) and setting in FIRST_PASS_OF:
        shown = FIRST_PASS_OF[setting]
    runs, size = load(results / shown), SETTINGS[shown]
    arms = [arm for arm in arms_of(size) if arm.name in runs]
    compared, by = {}, shared(run for of in runs.values() for run in of.values())
    for arm in arms:
        if arm.is_spin and (found := against_sft(runs[arm.name], runs.get(SFT, {}), by)):
            compared[arm.name] = found
    enough = {name: found for name, found in compared.items() if len(found["seeds"]) >= 3}
    chosen = min(enough or compared, key=lambda name: compared[name]["on_dev"], default=None)
    warm_up = runs.get(WARM_UP, {}).get(0)
    best_minus_sft = None
    if chosen:
        best_minus_sft = {"measure": f"{MEASURE}, lower is closer to people", "arm": chosen, **compared[chosen]}
    return {
        "setting": setting, "pass": shown, "best_minus_sft": best_minus_sft, "against_sft": compared,
        "beyond_sft": [
            f"{arm.name} θ_{number}"
            for arm in arms if arm.is_spin for number in beyond(runs[arm.name], runs.get(SFT, {}))
        ],
        "discriminators": list(by),
        "target_met": bool(best_minus_sft and best_minus_sft["value"] <= TARGET and best_minus_sft["high"] < 0),
        "theta_0": {"warm_up_iterate": plateau(warm_up), "complete": warm_up["complete"]} if warm_up else None,
        "warm_up_logp": [
            sum(each["dev"]["real_logp"]) / sum(each["dev"]["real_tokens"]) for each in warm_up["iterates"]
        ] if warm_up else [],
        "rows": [
            table_row(run, iterate, temperature)
            for arm in arms for run in runs[arm.name].values() for iterate in run["iterates"] if "test" in iterate
            for temperature in iterate["test"]["at"]
        ],
        "conversations": next(
            (each["test"]["conversations"] for of in runs.values() for run in of.values()
             for each in run["iterates"] if "test" in each), None,
        ),
        "why": {arm.name: arm.why for arm in arms_of(size)},
        "still_to_run": [
            f"{arm.name}, seed {seed}"
            for arm in arms_of(size) for seed in range(arm.seeds)
            if not is_finished(size, arm, runs.get(arm.name, {}).get(seed))
        ],
        "whole_setting_still_to_run": shown != setting, "train_rows": size.train_rows,
        "most_seeds": max(arm.seeds for arm in arms_of(size)),
        "most_iterates": max(iterations_of(size, arm) for arm in arms_of(size)),
    }  # fmt: skip
