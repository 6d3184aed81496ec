"""Tables, plots and intervals of the quality experiment, from the JSONs that run.py left.

    python benchmarks/quality/analyse.py [--setting word_problems]

Writes benchmarks/results/quality.json, quality.md and quality.svg. An arm's iterate is compared with the continued SFT
that had at least as many training tokens (and, in a second column, at least as much wall time): never with less compute
than its own. Intervals are 95 % by paired bootstrap over test rows, and over seeds where an arm has several.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from arms import SFT, WARM_UP

RESULTS = Path(__file__).resolve().parents[1] / "results"
RESAMPLES = 10_000
Run = dict[str, Any]
"""The JSON of one arm and seed."""
MEASURES = {
    "greedy": ("greedy accuracy", 3),
    "sampled": ("sampled accuracy", 3),
    "logp": ("log p(y) per token", 3),
    "jsd": ("JSD bound", 3),
    "length": ("length y′", 1),
    "distinct_2": ("distinct-2", 3),
}


def load(folder: Path) -> dict[str, dict[int, Run]]:
    """Runs by arm and seed."""
    runs: dict[str, dict[int, Run]] = defaultdict(dict)
    for file in sorted(folder.glob("*.json")):
        run = json.loads(file.read_text())
        runs[run["arm"]][run["seed"]] = run
    return dict(runs)


def per_row(iterate: Run, measure: str) -> np.ndarray:
    """One value a test row: ``greedy`` 0 or 1, ``sampled`` the mean of four."""
    values = np.asarray(iterate[measure], dtype=float)
    return values if values.ndim == 1 else values.mean(axis=1)


def summary(iterate: Run) -> dict[str, float]:
    return {
        "greedy": float(per_row(iterate, "greedy").mean()),
        "sampled": float(per_row(iterate, "sampled").mean()),
        "logp": sum(iterate["real_logp"]) / sum(iterate["real_tokens"]),
        "jsd": iterate["evaluation"].get("jsd_lower_bound", float("nan")),
        "length": iterate["generated_length"],
        "distinct_2": iterate["distinct_2"],
        "train_tokens": iterate["train_tokens"],
        "seconds": iterate["seconds"],
    }


def matched(sft: Run, iterate: Run, budget: str) -> Run | None:
    """The first iterate of continued SFT that had at least the budget of ``iterate``; None if none had."""
    return next((each for each in sft["iterates"] if each[budget] >= iterate[budget]), None)


def difference(arm: dict[int, Run], sft: dict[int, Run], number: int, measure: str, budget: str) -> np.ndarray | None:
    """Per seed and row, arm minus continued SFT at equal compute, [seeds, rows]; None if no seed has both."""
    rows = []
    for seed in sorted(arm.keys() & sft.keys()):
        iterates = arm[seed]["iterates"]
        other = matched(sft[seed], iterates[number], budget) if number < len(iterates) else None
        if other is not None:
            assert iterates[number]["prompt_ids"] == other["prompt_ids"], "not the same test rows"
            rows.append(per_row(iterates[number], measure) - per_row(other, measure))
    return np.stack(rows) if rows else None


def bootstrap(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of [seeds, rows] and its 95 % interval: seeds and rows are drawn again, a row in all seeds together."""
    rng = np.random.default_rng(seed)
    seeds, rows = values.shape
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        by_row = values[rng.integers(seeds, size=seeds)].mean(axis=0)
        means[i] = by_row[rng.integers(rows, size=rows)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}


def best_on_dev(dev: dict[str, dict[int, Run]], arms: set[str]) -> tuple[str, int] | None:
    """The arm of ``arms`` and its iterate with the highest sampled accuracy on dev rows."""
    found = [
        (summary(iterate)["sampled"], arm, iterate["iterate"])
        for arm, runs in dev.items()
        if arm in arms
        for run in runs.values()
        for iterate in run["iterates"][1:]
    ]
    return max(found)[1:] if found else None


def analyse(setting: str, folder: Path) -> dict[str, Any]:
    """Everything that quality.json holds."""
    test, dev = load(folder / setting / "test"), load(folder / setting / "dev")
    sft_arms = {arm for arm in test if arm.startswith(SFT)}
    spin_arms = test.keys() - sft_arms - {WARM_UP, "self_reinforcement"}
    # Both sides get their learning rate from the dev rows.
    chosen, chosen_sft = best_on_dev(dev, spin_arms), best_on_dev(dev, sft_arms)
    sft_arm = chosen_sft[0] if chosen_sft else SFT
    sft = test.get(sft_arm, {})
    arms = []
    for arm, runs in test.items():
        for number in range(max(len(run["iterates"]) for run in runs.values())):
            summaries = [summary(run["iterates"][number]) for run in runs.values() if number < len(run["iterates"])]
            mean = {name: float(np.mean([each[name] for each in summaries])) for name in summaries[0]}
            row: dict[str, Any] = {"arm": arm, "iterate": number, "seeds": sorted(runs), **mean}
            for budget in ("train_tokens", "seconds"):
                if number and arm != WARM_UP and arm not in sft_arms:
                    for measure in ("greedy", "sampled"):
                        values = difference(runs, sft, number, measure, budget)
                        row[f"{measure}_minus_sft_at_equal_{budget}"] = None if values is None else bootstrap(values)
            arms.append(row)
    compared = None
    if chosen is not None:
        values = difference(test[chosen[0]], sft, chosen[1], "sampled", "train_tokens")
        compared = None if values is None else bootstrap(values)
    search = [
        {"arm": arm, "iterate": iterate["iterate"], "seed": seed, **summary(iterate)}
        for arm, runs in dev.items()
        for seed, run in runs.items()
        for iterate in run["iterates"]
    ]
    return {
        "setting": setting, "arms": arms, "search_on_dev_rows": search,
        "chosen_on_dev_rows": None if chosen is None else {"arm": chosen[0], "iterate": chosen[1]},
        "continued_sft_arm": sft_arm, "spin_minus_sft": compared,
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """quality.md."""
    lines = [
        f"# SPIN against more SFT: {found['setting']}", "",
        "Made by `make quality` (`benchmarks/quality/`; each arm's recipe, seeds and versions are in its JSON).",
        "Sampled: 4 samples at temperature 1. The last columns are differences to continued SFT that had at least the",
        "same training tokens, or wall time; 95 % intervals by paired bootstrap. A dash: no such SFT iterate was run.",
        "",
    ]  # fmt: skip
    chosen, compared = found["chosen_on_dev_rows"], found["spin_minus_sft"]
    if chosen is None or compared is None:
        lines += ["**No result yet:** the search on dev rows, or the arms on test rows, have not been run.", ""]
    else:
        lines += [
            f"**SPIN minus SFT, sampled accuracy:** {_interval(compared)} ({chosen['arm']}, iterate "
            f"{chosen['iterate']}, against {found['continued_sft_arm']}; both chosen on kept-back rows of train).",
            "",
        ]  # fmt: skip
    heads = ["arm", "θ", "seeds", *(head for head, _ in MEASURES.values()), "k tokens", "minutes"]
    heads += ["Δ sampled, equal tokens", "Δ sampled, equal time", "Δ greedy, equal tokens"]
    lines += [_row(heads), _row(["---"] * len(heads))]
    for row in found["arms"]:
        cells = [row["arm"], str(row["iterate"]), str(len(row["seeds"]))]
        cells += [f"{row[name]:.{digits}f}" for name, (_, digits) in MEASURES.items()]
        cells += [f"{row['train_tokens'] / 1000:.0f}", f"{row['seconds'] / 60:.0f}"]
        cells += [
            _interval(row.get(f"{measure}_minus_sft_at_equal_{budget}"))
            for measure, budget in [("sampled", "train_tokens"), ("sampled", "seconds"), ("greedy", "train_tokens")]
        ]
        lines.append(_row(cells))
    lines += [
        "",
        "## The search",
        "",
        "On rows of train that were kept back from training; nothing was chosen on test.",
        "",
    ]
    lines += [_row(["arm", "θ", "seed", *(head for head, _ in MEASURES.values())]), _row(["---"] * (3 + len(MEASURES)))]
    for row in found["search_on_dev_rows"]:
        cells = [f"{row[name]:.{digits}f}" for name, (_, digits) in MEASURES.items()]
        lines.append(_row([row["arm"], str(row["iterate"]), str(row["seed"]), *cells]))
    picture = ["", "![accuracy over training tokens](quality.svg)"] if found["arms"] else []
    return "\n".join([*lines, *picture, ""])


def known_distribution(file: Path) -> str:
    """The section of quality.md about exact divergences, from what known_distribution.py wrote; empty without."""
    if not file.exists():
        return ""
    content = json.loads(file.read_text())
    runs = list(content["seeds"].values())
    iterations = len(next(iter(runs[0].values()))["kl"])
    lines = [
        "", "## A known distribution", "",
        f"KL(p_data‖p_θ) in millinats, exact, after each iteration; mean of {len(runs)} seeds. In brackets: iterations",
        f"that are solved exactly (Theorem 5.4). Made by `{content['command']}`.", "",
        _row(["arm", *(f"θ_{i}" for i in range(iterations))]), _row(["---"] * (iterations + 1)),
    ]  # fmt: skip

    def mean(arm: str, kind: str, iteration: int) -> float:
        return 1000 * abs(float(np.mean([run[arm][kind][iteration] for run in runs])))

    for arm, values in runs[0].items():
        cells = [f"{mean(arm, 'kl', i):.1f}" for i in range(iterations)]
        if "exact_kl" in values:
            cells = [f"{cell} ({mean(arm, 'exact_kl', i):.3g})" for i, cell in enumerate(cells)]
        lines.append(_row([arm, *cells]))
    return "\n".join([*lines, ""])


def plot(found: dict[str, Any], file: Path) -> None:
    """Sampled and greedy accuracy over training tokens since θ_0, a line an arm."""
    width, height, margin = 460, 260, 46
    rows = [row for row in found["arms"] if row["arm"] != WARM_UP]
    most = max((row["train_tokens"] for row in rows), default=1) or 1
    top = max((max(row["greedy"], row["sampled"]) for row in rows), default=1) or 1
    names = list(dict.fromkeys(row["arm"] for row in rows))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{height + 20 * len(names)}" '
             'font-family="sans-serif" font-size="11">']  # fmt: skip
    for panel, measure in enumerate(("sampled", "greedy")):
        left, right, bottom = panel * width + margin, panel * width + width - 10, height - margin
        parts.append(f'<text x="{left}" y="14">{measure} accuracy, 0 to {top:.3f}; training tokens, 0 to {most}</text>')
        parts.append(f'<path d="M{left} 22V{bottom}H{right}" fill="none" stroke="#888"/>')
        for number, name in enumerate(names):
            mine = [row for row in rows if row["arm"] == name]
            across = [left + (right - left) * row["train_tokens"] / most for row in mine]
            down = [bottom - (bottom - 22) * row[measure] / top for row in mine]
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{_color(number)}" stroke-width="2"/>')
    for number, name in enumerate(names):
        parts.append(f'<text x="{margin}" y="{height + 20 * number}" fill="{_color(number)}">{name}</text>')
    file.write_text("\n".join([*parts, "</svg>", ""]))


def _color(number: int) -> str:
    return f"hsl({number * 67 % 360},70%,40%)"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _interval(found: dict[str, float] | None) -> str:
    return "–" if found is None else f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="word_problems")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality", help="where run.py left its JSONs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = analyse(options.setting, options.results)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
    text = markdown(found) + known_distribution(RESULTS / "known_distribution.json")
    (options.out / "quality.md").write_text(text)
    if found["arms"]:
        plot(found, options.out / "quality.svg")
    print(f"{options.out / 'quality.md'}: {len(found['arms'])} iterates")
    print(f"SPIN minus SFT, sampled accuracy: {_interval(found['spin_minus_sft'])}")


if __name__ == "__main__":
    main()
