"""Page of the quality experiment: tables and plot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from arms import BUDGETS, WARM_UP

MAIN_SETTING = "word_problems"
MEASURES = {
    "greedy": ("greedy accuracy", 3),
    "sampled": ("sampled accuracy", 3),
    "logp": ("log p(y) per token", 3),
    "jsd": ("JSD bound of its opponent", 3),
    "length": ("length y′", 1),
    "distinct_2": ("distinct-2", 3),
}
MOVED = {
    "real_drift": ("Δ log p(y)", 2),
    "generated_drift": ("Δ log p(y′)", 2),
    "loss_on_own": ("loss on its own samples", 2),
}
"""Changes in an iteration, from the run's own evaluation on at most 100 dev rows."""


def file_stem(setting: str) -> str:
    return "quality" if setting == MAIN_SETTING else f"quality_{setting}"


def markdown(found: dict[str, Any]) -> str:
    setting = found["setting"]
    which = "" if setting == MAIN_SETTING else f" --setting {setting}"
    chosen, compared, greedy = found["chosen_on_dev_rows"], found["spin_minus_sft"], found["spin_minus_sft_greedy"]
    lines = [
        f"# SPIN against more SFT: {setting}", "",
        f"Made by `make quality`: `python benchmarks/experiments/quality/run.py --data FOLDER{which}` makes the arms,",
        f"`analyse.py{which}` this. Each arm's recipe, seed and versions are in its JSON",
        f"([quality/{setting}](quality/{setting})); `benchmarks/experiments/quality/arms.py` says why each is there.",
        "θ_0 is one model for all arms; a seed is an order of rows and a stream of samples.",
        "Sampled: 4 samples at temperature 1. Differences are to continued SFT that had at least the same training",
        "tokens, computed tokens (training + a third of what was generated and scored), or wall time (of a shared",
        "machine, pauses included); 95 % intervals by paired bootstrap. A dash: no such SFT iterate is there.",
        "Arms are chosen by sampled accuracy on dev rows, mean of the seeds that all of them have.",
        "Self-reinforcement sees few of the labels and has a θ_0 of its own, whose cost is not counted.", "",
    ]  # fmt: skip
    if compared is None:
        lines += [f"**No comparison yet:** {found['spin_minus_sft_missing_because']}.", ""]
    else:
        lines += [
            f"**SPIN minus SFT on test rows: sampled accuracy {interval(compared)}, greedy {interval(greedy)}**",
            f"({chosen['arm']}, θ_{chosen['iterate']}, against {found['continued_sft_arm']}; both chosen on dev rows).",
            f"Its second iteration minus its first, sampled: {interval(found['second_iteration_minus_first'])}.", "",
        ]  # fmt: skip
    if start := found["theta_0"]:
        lines += [
            f"θ_0 is iterate {start['warm_up_iterate']} of the warm-up"
            + (
                "." if start["complete"] else " so far; whether log p(y) of dev rows still rises after it is not known."
            ),
            "",
        ]
    if found["still_to_run"]:
        lines += [f"Still to run: {'; '.join(found['still_to_run'])}.", ""]
    heads = ["arm", "θ", "seeds", *(head for head, _ in MEASURES.values()), "k tokens", "k computed", "minutes"]
    heads += [f"Δ sampled, equal {name}" for name in BUDGETS.values()] + ["Δ greedy, equal training tokens"]
    lines += ["## On test rows", "", table_line(heads), table_line(["---"] * len(heads))]
    for row in found["arms"]:
        cells = [row["arm"], str(row["iterate"]), str(len(row["seeds"])), *_measures(row)]
        cells += [f"{row['train_tokens'] / 1000:.0f}", f"{row['compute'] / 1000:.0f}", f"{row['seconds'] / 60:.0f}"]
        cells += [interval(row.get(f"sampled_minus_sft_at_equal_{budget}")) for budget in BUDGETS]
        lines.append(table_line([*cells, interval(row.get("greedy_minus_sft_at_equal_train_tokens"))]))
    lines += ["", "## On dev rows", "", "Rows of train that no arm was trained on: what everything was chosen by.", ""]
    lines += [
        "Δ is the change from the iterate before, in nats per response, on at most 100 of these rows: y′ is the",
        "iterate's before. A loss on its own samples above ln 2 = 0.69: more mass moved than people differ by. The",
        "bound on JSD is taken at the arm's β, which is 0.1 for SFT: looser there.", "",
    ]  # fmt: skip
    measures = MEASURES | MOVED
    heads = ["arm", "θ", "seeds", *(head for head, _ in measures.values())]
    lines += [table_line(heads), table_line(["---"] * len(heads))]
    for row in found["search_on_dev_rows"]:
        cells = [row["arm"], str(row["iterate"]), str(len(row["seeds"])), *_measures(row, measures)]
        lines.append(table_line(cells))
    lines += _temperatures(found["by_temperature"])
    picture = ["", f"![accuracy over training tokens]({file_stem(setting)}.svg)"] if found["arms"] else []
    return "\n".join([*lines, *picture, ""])


def _measures(row: dict[str, Any], measures: dict[str, tuple[str, int]] = MEASURES) -> list[str]:
    return ["–" if row[name] is None else f"{row[name]:.{digits}f}" for name, (_, digits) in measures.items()]


def _temperatures(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    temperatures = sorted({name for row in rows for name in row["sampled_at"]}, key=float, reverse=True)
    heads = ["arm", "θ", "seed", *(f"at {name}" for name in temperatures), "greedy"]
    lines = ["", "## By temperature", ""]
    lines += ["Sampled accuracy on test rows at lower temperatures: what sharpening gives without any training.", ""]
    lines += [table_line(heads), table_line(["---"] * len(heads))]
    for row in rows:
        cells = [f"{row['sampled_at'][name]:.3f}" if name in row["sampled_at"] else "–" for name in temperatures]
        lines.append(table_line([row["arm"], str(row["iterate"]), str(row["seed"]), *cells, f"{row['greedy']:.3f}"]))
    return lines


def known_distribution(file: Path) -> str:
    if not file.exists():
        return ""
    content = json.loads(file.read_text())
    runs = list(content["seeds"].values())
    iterations = len(next(iter(runs[0].values()))["kl"])
    lines = [
        "", "## A known distribution", "",
        f"KL(p_data‖p_θ) in millinats, exact, after each iteration; mean of {len(runs)} seeds. In brackets: iterations",
        f"that are solved exactly (Theorem 5.4). Made by `{content['command']}`.", "",
        table_line(["arm", *(f"θ_{i}" for i in range(iterations))]), table_line(["---"] * (iterations + 1)),
    ]  # fmt: skip

    def mean(arm: str, kind: str, iteration: int) -> float:
        return 1000 * abs(float(np.mean([run[arm][kind][iteration] for run in runs])))

    for arm, values in runs[0].items():
        cells = [f"{mean(arm, 'kl', i):.1f}" for i in range(iterations)]
        if "exact_kl" in values:
            cells = [f"{cell} ({mean(arm, 'exact_kl', i):.3g})" for i, cell in enumerate(cells)]
        lines.append(table_line([arm, *cells]))
    return "\n".join([*lines, ""])


def plot(found: dict[str, Any], file: Path) -> None:
    """Draws sampled and greedy accuracy on test rows over training tokens, a line for each arm."""
    width, height, margin = 460, 260, 46
    rows = [row for row in found["arms"] if row["arm"] != WARM_UP]
    start = found["theta_0"] and found["theta_0"]["warm_up_iterate"]
    first = [row | {"train_tokens": 0} for row in found["arms"] if (row["arm"], row["iterate"]) == (WARM_UP, start)]
    values = [row[measure] for row in [*rows, *first] for measure in ("sampled", "greedy")]
    most = max((row["train_tokens"] for row in rows), default=1) or 1
    top, low = max(values, default=1.0), min(values, default=0.0)
    span = (top - low) or 1.0
    names = list(dict.fromkeys(row["arm"] for row in rows))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{height + 20 * len(names)}" '
             'font-family="sans-serif" font-size="11">']  # fmt: skip
    for panel, measure in enumerate(("sampled", "greedy")):
        left, right, bottom = panel * width + margin, panel * width + width - 10, height - margin
        parts.append(
            f'<text x="{left}" y="14">{measure} accuracy, {low:.3f} to {top:.3f}; tokens, 0 to {most:.0f}</text>'
        )
        parts.append(f'<path d="M{left} 22V{bottom}H{right}" fill="none" stroke="#888"/>')
        for number, name in enumerate(names):
            mine = [row for row in rows if row["arm"] == name]
            if mine[0]["iterate"] > 0:
                mine = [*first, *mine]
            across = [left + (right - left) * row["train_tokens"] / most for row in mine]
            down = [bottom - (bottom - 22) * (row[measure] - low) / span for row in mine]
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color(number)}" stroke-width="2"/>')
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color(number)}"/>'
                for x, y in zip(across, down, strict=True)
            ]
    for number, name in enumerate(names):
        parts.append(f'<text x="{margin}" y="{height + 20 * number}" fill="{color(number)}">{name}</text>')
    file.write_text("\n".join([*parts, "</svg>", ""]))


def color(number: int) -> str:
    return f"hsl({number * 67 % 360},70%,40%)"


def table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def interval(found: dict[str, float] | None) -> str:
    return "–" if found is None else f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
