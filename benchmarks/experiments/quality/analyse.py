"""Tables, plots and intervals of the quality experiment, from the JSONs that run.py has written so far.

    python benchmarks/experiments/quality/analyse.py [--setting word_problems]

An iterate is compared with the first iterate of continued SFT that cost at least as much. Arms, rates and iterates are
chosen on dev rows and reported on test rows.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import analyse_replies
import numpy as np
import page_replies
from arms import ARMS, BUDGETS, SETTINGS, SFT, WARM_UP, Run, Setting, arms_of, is_finished, numbered, plateau
from intervals import bootstrap
from page import MAIN_SETTING, file_stem, interval, known_distribution, markdown, plot

RESULTS = Path(__file__).resolve().parents[2] / "results"
REPLIES = "replies"
Iterate = dict[str, Any]


def load(folder: Path) -> dict[str, dict[int, Run]]:
    """Returns runs by arm and seed; arms are in the order of ``ARMS``."""
    runs: dict[str, dict[int, Run]] = defaultdict(dict)
    for file in sorted(folder.glob("*.json")):
        run = json.loads(file.read_text())
        runs[run["arm"]][run["seed"]] = run
    names = [arm.name for arm in ARMS]
    return dict(sorted(runs.items(), key=lambda item: names.index(item[0]) if item[0] in names else len(names)))


def per_row(iterate: Iterate, measure: str, split: str = "test") -> np.ndarray:
    """Returns a value for each row: 0 or 1 for ``greedy``, the mean of four samples for ``sampled``."""
    values = np.asarray(iterate[split][measure], dtype=float)
    return values if values.ndim == 1 else values.mean(axis=1)


def summary(iterate: Iterate, split: str) -> dict[str, Any]:
    measured, evaluation = iterate[split], iterate["evaluation"]
    answered = "greedy" in measured
    return {
        "greedy": float(per_row(iterate, "greedy", split).mean()) if answered else None,
        "sampled": float(per_row(iterate, "sampled", split).mean()) if answered else None,
        "logp": sum(measured["real_logp"]) / sum(measured["real_tokens"]),
        "jsd": evaluation.get("jsd_lower_bound"),
        "real_drift": evaluation.get("real_logp_drift"),
        "generated_drift": evaluation.get("against_opponent", {}).get("generated_logp_drift"),
        "loss_on_own": evaluation.get("against_self", {}).get("loss"),
        "length": measured.get("generated_length"),
        "distinct_2": measured.get("distinct_2"),
        **{budget: iterate[budget] for budget in BUDGETS},
    }


def matched(sft: Run, iterate: Iterate, budget: str) -> Iterate | None:
    """Returns the first iterate of continued SFT that had at least the budget of ``iterate``; None if none had."""
    return next((each for each in sft["iterates"] if each[budget] >= iterate[budget]), None)


def difference(arm: dict[int, Run], sft: dict[int, Run], number: int, measure: str, budget: str) -> np.ndarray | None:
    """Returns arm minus continued SFT at equal compute on test rows, [seeds, rows]; None if no seed has both."""
    rows = []
    for seed in sorted(arm.keys() & sft.keys()):
        iterate = numbered(arm[seed], number)
        other = matched(sft[seed], iterate, budget) if iterate else None
        if iterate and other:
            rows.append(per_row(iterate, measure) - per_row(other, measure))
    return np.stack(rows) if rows else None


def between(arm: dict[int, Run], later: int, earlier: int, measure: str) -> dict[str, float] | None:
    pairs = [(numbered(run, later), numbered(run, earlier)) for run in arm.values()]
    rows = [per_row(one, measure) - per_row(other, measure) for one, other in pairs if one and other]
    return bootstrap(np.stack(rows)) if rows else None


def best_on_dev(runs: dict[str, dict[int, Run]], arms: list[str]) -> tuple[str, int] | None:
    """Returns the arm and iterate with the highest sampled accuracy on dev rows; the first of equals.

    The mean is over the seeds that all arms have, so that one lucky seed does not beat a mean of three.
    """
    common = set.intersection(*(set(runs[arm]) for arm in arms)) if arms else set()
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for arm in arms:
        for seed in common:
            for iterate in runs[arm][seed]["iterates"]:
                found[arm, iterate["iterate"]].append(summary(iterate, "dev")["sampled"])
    return max(found, key=lambda key: float(np.mean(found[key]))) if found else None


def analyse(folder: Path, setting: str) -> dict[str, Any]:
    runs = load(folder / setting)
    sft_arms = [arm for arm in runs if arm.startswith(SFT)]
    spin_arms = [arm for arm, of_seeds in runs.items() if any(run["is_spin"] for run in of_seeds.values())]
    chosen, chosen_sft = best_on_dev(runs, spin_arms), best_on_dev(runs, sft_arms)
    sft = runs[chosen_sft[0]] if chosen_sft else {}
    rows = {split: [_table_row(arm, number, of_seeds, split) for arm, of_seeds in runs.items()
                    for number in _numbers(of_seeds, split)] for split in ("test", "dev")}  # fmt: skip
    for row in rows["test"]:
        if row["arm"] != WARM_UP and row["arm"] not in sft_arms:
            row |= {
                f"{measure}_minus_sft_at_equal_{budget}": _interval_of(
                    difference(runs[row["arm"]], sft, row["iterate"], measure, budget)
                )
                for budget in BUDGETS
                for measure in ("greedy", "sampled")
            }
    found: dict[str, Any] = {"setting": setting, "spin_minus_sft": None, "spin_minus_sft_greedy": None}
    found["spin_minus_sft_missing_because"] = _missing(chosen, chosen_sft)
    if chosen and chosen_sft:
        for name, measure in [("spin_minus_sft", "sampled"), ("spin_minus_sft_greedy", "greedy")]:
            values = difference(runs[chosen[0]], sft, chosen[1], measure, "train_tokens")
            found[name] = _interval_of(values)
        if found["spin_minus_sft"] is None:
            found["spin_minus_sft_missing_because"] = (
                f"no seed of {chosen_sft[0]} has an iterate with the training tokens of {chosen[0]}, θ_{chosen[1]}"
            )
        found["second_iteration_minus_first"] = between(runs[chosen[0]], 2, 1, "sampled")
    warm_up = next(iter(runs.get(WARM_UP, {}).values()), None)
    return found | {
        "chosen_on_dev_rows": {"arm": chosen[0], "iterate": chosen[1]} if chosen else None,
        "continued_sft_arm": chosen_sft[0] if chosen_sft else None,
        "theta_0": _start(warm_up) if warm_up else None,
        "by_temperature": _by_temperature(runs),
        "arms": rows["test"],
        "search_on_dev_rows": rows["dev"],
        "still_to_run": _missing_arms(runs, SETTINGS[setting]),
    }


def _start(warm_up: Run) -> dict[str, Any]:
    return {"warm_up_iterate": plateau(warm_up), "complete": warm_up["complete"]}


def _by_temperature(runs: dict[str, dict[int, Run]]) -> list[dict[str, Any]]:
    rows = []
    measured = (
        (run, iterate) for of_seeds in runs.values() for run in of_seeds.values() for iterate in run["iterates"]
    )
    for run, iterate in measured:
        cooler = {key.partition("_at_")[2]: key for key in iterate if key.startswith("test_at_")}
        if cooler:
            keys = {"1": "test"} | cooler
            accuracy = {name: float(per_row(iterate, "sampled", key).mean()) for name, key in keys.items()}
            which = {"arm": run["arm"], "iterate": iterate["iterate"], "seed": run["seed"]}
            rows.append(which | {"sampled_at": accuracy, "greedy": float(per_row(iterate, "greedy").mean())})
    return rows


def _missing(chosen: tuple[str, int] | None, chosen_sft: tuple[str, int] | None) -> str | None:
    if chosen and chosen_sft:
        return None
    names = [name for name, found in (("SPIN", chosen), ("continued SFT", chosen_sft)) if not found]
    return f"no arm of {' and none of '.join(names)} has an iterate yet"


def _missing_arms(runs: dict[str, dict[int, Run]], setting: Setting) -> list[str]:
    return [
        f"{arm.name}, seed {seed}"
        for arm in arms_of(setting)
        for seed in range(arm.seeds)
        if not is_finished(setting, arm, runs.get(arm.name, {}).get(seed))
    ]


def _numbers(of_seeds: dict[int, Run], split: str) -> list[int]:
    return sorted({each["iterate"] for run in of_seeds.values() for each in run["iterates"] if split in each})


def _table_row(arm: str, number: int, of_seeds: dict[int, Run], split: str) -> dict[str, Any]:
    there = {seed: iterate for seed, run in of_seeds.items() if (iterate := numbered(run, number))}
    summaries = [summary(iterate, split) for iterate in there.values()]
    mean = {
        name: float(np.mean([each[name] for each in summaries])) if value is not None else None
        for name, value in summaries[0].items()
    }
    return {"arm": arm, "iterate": number, "seeds": sorted(there), **mean}


def _interval_of(values: np.ndarray | None) -> dict[str, float] | None:
    return None if values is None else bootstrap(values)


def write_replies(results: Path, out: Path) -> None:
    found = analyse_replies.analyse(results, REPLIES)
    out.mkdir(parents=True, exist_ok=True)
    page = out / f"{file_stem(REPLIES)}.md"
    page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    page.write_text(page_replies.markdown(found))
    if found["rows"]:
        page.with_suffix(".svg").write_text(page_replies.plot(found))
    print(f"{page}: {len(found['rows'])} rows; best minus SFT: {interval(found['best_minus_sft'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=[*sorted(SETTINGS), REPLIES], default=MAIN_SETTING)
    parser.add_argument("--results", type=Path, default=RESULTS / "quality", help="where run.py left its JSONs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.setting == REPLIES:
        write_replies(options.results, options.out)
        return
    found = analyse(options.results, options.setting)
    options.out.mkdir(parents=True, exist_ok=True)
    page = options.out / f"{file_stem(options.setting)}.md"
    page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    text = markdown(found)
    if options.setting == MAIN_SETTING:
        text += known_distribution(RESULTS / "known_distribution.json")
    page.write_text(text)
    if found["arms"]:
        plot(found, page.with_suffix(".svg"))
    print(f"{page}: {len(found['arms'])} iterates")
    print(f"SPIN minus SFT, sampled accuracy: {interval(found['spin_minus_sft'])}")
    if found["spin_minus_sft_missing_because"]:
        print(found["spin_minus_sft_missing_because"])


if __name__ == "__main__":
    main()
