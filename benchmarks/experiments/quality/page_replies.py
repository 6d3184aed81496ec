"""Page of the experiment on replies: tables and plot."""

from typing import Any

from page import color, interval, table_line

MEASURES = {
    "ngrams": ("n-grams", 3), "embeddings": ("embeddings", 3), "mauve": ("MAUVE-like", 3), "logp": ("log p(y)", 3),
    "generated_length": ("length y′", 1), "length_distance": ("length distance", 2), "cut": ("cut", 3),
    "distinct_2": ("distinct-2", 3), "self_bleu": ("self-BLEU", 3),
}  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    best, theta_0 = found["best_minus_sft"], found["theta_0"]
    lines = [
        "# Replies: self-play against more SFT on small talk", "",
        "Made by `make quality`: `python benchmarks/experiments/quality/run.py --setting replies` makes the arms,",
        "`analyse.py --setting replies` this. The measures were fixed before the first run",
        "(`benchmarks/experiments/quality/likeness.py`): the accuracy of two discriminators that know nothing of the",
        "model, trained and asked on different conversations (0.5 is perfect); a MAUVE-like area on embeddings (1 is",
        "perfect); log p of people's replies per token; lengths, cuts, distinct-2 and self-BLEU. Iterate and",
        "temperature are chosen on dev conversations. Continued SFT is compared at equal training tokens, at its best",
        "temperature. Intervals are 95 %, by paired bootstrap over test conversations, and over seeds where there",
        "are several.", "",
    ]  # fmt: skip
    if found["whole_setting_still_to_run"]:
        lines += [
            f"**A first pass:** {found['train_rows']} rows to train on, at most {found['most_seeds']} seed(s) and "
            f"{found['most_iterates']} iterates an arm",
            "(`--setting replies_first_pass`). The whole setting has all rows and three seeds, and has not been run.",
            "",
        ]
    if best is None:
        lines += ["**No comparison yet:** no arm and continued SFT with as many training tokens are both there.", ""]
    else:
        lines += [
            f"**Best arm minus SFT, accuracy of discriminators (lower is closer to people): {interval(best)}**",
            *(f"(by {name} alone: some runs lack the other discriminator)" for name in _lone(found)),
            f"({best['arm']}, θ_{best['iterate']} at temperature {best['temperature']}, against",
            f"θ_{best['sft_iterate']} of continued SFT at {best['sft_temperature']}; {len(best['seeds'])} seed(s)).",
            f"The target, −0.02 with an interval below 0, is {'met' if found['target_met'] else 'not met'}.", "",
        ]  # fmt: skip
    if theta_0:
        course = ", ".join(f"{value:.3f}" for value in found["warm_up_logp"])
        so_far = "" if theta_0["complete"] else " so far"
        last = theta_0["warm_up_iterate"] == len(found["warm_up_logp"])
        lines += [
            f"θ_0 is iterate {theta_0['warm_up_iterate']} of the warm-up{so_far}; log p(y) of dev rows per token after",
            f"each epoch: {course}.{' It still rose at the end: the plateau was not reached.' if last else ''}", "",
        ]  # fmt: skip
    if found["still_to_run"]:
        lines += [f"Still to run: {'; '.join(found['still_to_run'])}.", ""]
    if found["against_sft"]:
        lines += [
            "## Against continued SFT",
            "",
            table_line(["arm", "seeds", "θ", "at", "SFT's θ", "at", "difference"]),
        ]
        lines.append(table_line(["---"] * 7))
        for name, one in found["against_sft"].items():
            cells = [name, len(one["seeds"]), one["iterate"], one["temperature"], one["sft_iterate"]]
            lines.append(table_line([*map(str, cells), one["sft_temperature"], interval(one)]))
        lines.append("")
    if found["beyond_sft"]:
        lines += [f"Not compared, as continued SFT has not been trained as long: {', '.join(found['beyond_sft'])}.", ""]
    lines += _rows(found)
    lines += ["", "## Arms", ""]
    lines += [f"- `{name}`: {why}" for name, why in found["why"].items()]
    return "\n".join([*lines, ""])


def _rows(found: dict[str, Any]) -> list[str]:
    if not found["rows"]:
        return []
    one = found["rows"][0]
    lines = [
        "## On test rows", "",
        f"{found['conversations']} conversations. People's replies: {one['real_length']:.1f} tokens, distinct-2 "
        f"{one['real_distinct_2']:.3f}, self-BLEU {one['people_self_bleu']:.3f}.", "",
    ]  # fmt: skip
    heads = ["arm", "seed", "θ", "temperature", *(head for head, _ in MEASURES.values()), "k tokens"]
    lines += [table_line(heads), table_line(["---"] * len(heads))]
    for row in found["rows"]:
        cells = [row["arm"], str(row["seed"]), str(row["iterate"]), row["temperature"]]
        cells += ["–" if row[key] is None else f"{row[key]:.{digits}f}" for key, (_, digits) in MEASURES.items()]
        lines.append(table_line([*cells, f"{row['train_tokens'] / 1000:.0f}"]))
    return [*lines, "", f"![accuracy of the discriminators over temperature](quality_{found['setting']}.svg)"]


def plot(found: dict[str, Any]) -> str:
    """Returns an SVG: mean accuracy of the discriminators over temperature, a line for each last iterate."""
    width, height, margin = 640, 300, 46
    last: dict[tuple[str, int], int] = {}
    for row in found["rows"]:
        key = (row["arm"], row["seed"])
        last[key] = max(last.get(key, 0), row["iterate"])
    lines = {
        key: sorted(
            (float(row["temperature"]), _mean(row, found["discriminators"])) for row in found["rows"]
            if (row["arm"], row["seed"], row["iterate"]) == (*key, number)
        )
        for key, number in last.items()
    }  # fmt: skip
    points = [point for line in lines.values() for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(0.5, *(y for _, y in points)), max(y for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = margin + (width - 2 * margin) * (x - left) / ((right - left) or 1)
        return across, height - margin - (height - 2 * margin) * (y - low) / ((high - low) or 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + 20 * len(lines)}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="{margin}" y="14">accuracy of the discriminators, {low:.3f} to {high:.3f}; temperature, {left:g} to '
        f"{right:g}</text>",
        f'<path d="M{margin} 22V{height - margin}H{width - margin}" fill="none" stroke="#888"/>',
    ]  # fmt: skip
    for number, ((arm, seed), line) in enumerate(lines.items()):
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{color(number)}" stroke-width="2"/>')
        name, down = f"{arm}, θ_{last[arm, seed]}, seed {seed}", height + 20 * number
        parts.append(f'<text x="{margin}" y="{down}" fill="{color(number)}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _mean(row: dict[str, Any], by: list[str]) -> float:
    return sum(row[name] for name in by) / len(by)


def _lone(found: dict[str, Any]) -> list[str]:
    """Returns the discriminator that stands alone, if one does."""
    return found["discriminators"] if len(found["discriminators"]) == 1 else []
