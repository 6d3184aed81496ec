"""Tables of the documentation.

python benchmarks/tables.py results            # prints results/bench.json beside its targets
python benchmarks/tables.py sizes [--write]    # the tables of sizes in docs/cluster.md; nothing is run
python benchmarks/tables.py rates              # planning/rates.json, from results/gpu.json
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from harness import RESULTS
from rich.console import Console
from rich.table import Table

from spin_ray.config.load import load_config
from spin_ray.config.sections import Mesh
from spin_ray.loop.algorithms.table import find_algorithm
from spin_ray.planning.cluster import Cluster
from spin_ray.planning.hardware import DEVICE_NAMES, GB
from spin_ray.planning.plan import Given, predict

ROOT = Path(__file__).resolve().parents[1]
CLUSTER_PAGE = ROOT / "docs" / "cluster.md"
MEASURED_PAGE = ROOT / "docs" / "measured.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["results", "sizes", "rates"])
    parser.add_argument("--write", action="store_true", help="put the table of sizes into docs/cluster.md")
    options = parser.parse_args()
    if options.table == "results":
        print_results()
        return
    if options.table == "rates":
        rates = measured_rates(json.loads((RESULTS / "gpu.json").read_text())["rows"])
        (ROOT / "spin_ray/planning/rates.json").write_text(json.dumps({"rates": rates}, indent=1) + "\n")
        print(f"spin_ray/planning/rates.json: {len(rates)} rates")
        return
    for name, table in {"sizes": sizes(), "nodes": scaling(), "nodes at 400 Gb/s": scaling(400)}.items():
        print(f"{table}\n")
        if options.write:
            put(name, table)


def put(name: str, text: str, page: Path = CLUSTER_PAGE) -> None:
    """Replaces a page's table, between ``<!-- NAME: by `COMMAND` -->`` and ``<!-- end of NAME -->``.

    Raises:
        ValueError: the page has no place for it, or more than one.
    """
    place = re.compile(rf"(<!-- {re.escape(name)}: by .*? -->\n).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    content, found = place.subn(lambda match: f"{match[1]}\n{text.strip()}\n\n{match[2]}", page.read_text())
    if found != 1:
        raise ValueError(f"{page}: has {found} places for {name}")
    page.write_text(content)


def print_results() -> None:
    table = Table(title="results/bench.json: median of runs, beside its target")
    for name in ("question", "result", "target", "met", "lowest to highest", "runs", "measured", "commit"):
        table.add_column(name, justify="right" if name in ("result", "runs") else "left")
    rows = json.loads((RESULTS / "bench.json").read_text())["rows"]
    for row in sorted(rows, key=lambda row: (int((re.match(r"\d+", row["id"]) or ["999"])[0]), row["id"])):
        spread = " to ".join(f"{value:g}" for value in row["spread"])
        met = "yes" if row["met"] else "[bold red]NO"
        shown = (row["id"], f"{row['value']:g}", row["target"], met, spread, str(row["runs"]))
        table.add_row(*shown, row["measured"], row["commit"])
    Console(width=160).print(table)


BEST_ROW = re.compile(r"1.5B, 130/256, best: (training|scoring), MFU of the data sheet")


def measured_rates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns MFU of the data sheet that the plan's cards have shown, for ``planning.rates``."""
    return [
        {
            "card": DEVICE_NAMES[row["card"]], "stage": found[1], "parameters": 1.54e9, "mfu": row["value"],
            "measured": row["measured"], "commit": row["commit"],
        }
        for row in rows
        if (found := BEST_ROW.fullmatch(row["id"])) and row["card"] in DEVICE_NAMES and row["value"]
    ]  # fmt: skip


LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192,
    "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip


LENGTHS = Given(rows=50000, prompt_tokens=130, response_tokens=256)
ONE_CARD = {
    "train.workers": "1", "generation.replicas": "1", "train.pack_length": "2304",
    "train.gradient_checkpointing": "true", "generation.engine.max_num_seqs": "64",
}  # fmt: skip
"""Settings with which one GPU trains adapters, as in zephyr_7b_24gb.yaml."""


def sizes() -> str:
    """Returns hours and memory for the paper's data; a model that is too large for its nodes raises."""
    lines = [
        "| model | nodes | settings | mesh | hours | fullest GPU, GB | in which stage |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_70B))
        for model, nodes, gpus, gpu, changes in [
            ("7B", 1, 8, "A100-80G", {}),
            ("7B", 1, 8, "H100-80G", {}),
            ("7B", 2, 8, "H100-80G", _for_7b(16)),
            ("7B", 2, 8, "H100-80G", _for_7b(16) | {"train.global_batch_pairs": "128"}),
            ("7B", 8, 8, "H100-80G", _for_7b(64) | {"train.global_batch_pairs": "512"}),
            ("70B", 4, 8, "H100-80G", _for_70b(32)),
            ("70B", 8, 8, "H100-80G", _for_70b(64)),
            ("70B", 8, 8, "H100-80G", _for_70b(64) | {"train.global_batch_pairs": "512"}),
            ("7B", 1, 1, "RTX-4090", ONE_CARD | {"train.lora": "{rank: 16}"}),
            ("7B", 1, 1, "RTX-4090", ONE_CARD | {"train.lora": "{rank: 16, base: nf4, merge: false}"}),
        ]:
            config = load_config(
                ROOT / "jobs" / "recipes" / "zephyr_7b.yaml",
                changes | ({"model.path": folder} if model == "70B" else {}),
            )
            plan = predict(
                config, Cluster(nodes=nodes, gpu=gpu, gpus_per_node=gpus), LENGTHS, find_algorithm(config.algorithm)
            )
            fullest = max((stage for phase in plan.phases for stage in phase.stages), key=lambda stage: stage.needed)
            settings = " ".join(f"`--{key}={value}`" for key, value in changes.items()) or "as it is"
            lines.append(
                f"| {model} | {nodes} × {gpus} {gpu} | {settings} | {_short(plan.mesh.mesh)} "
                f"| {plan.seconds / 3600:.1f} | {fullest.needed / GB:.0f} | {fullest.name} |"
            )
    return "\n".join(lines)


def scaling(network: float | None = None) -> str:
    """Returns hours of zephyr_7b.yaml by nodes of 8 H100, with its own batch and with the plan's larger one."""
    config = load_config(ROOT / "jobs" / "recipes" / "zephyr_7b.yaml")
    found = predict(
        config, Cluster(nodes=8, gpu="H100", network=network), LENGTHS, find_algorithm(config.algorithm)
    ).scaling
    assert found is not None
    batches = f"{found.with_own_batch[0].batch} pairs | {found.batch} pairs"
    lines = [f"| nodes | mesh | {batches} |", "|---|---|---|---|"]
    for own, enough in zip(found.with_own_batch, found.with_enough, strict=True):
        lines.append(f"| {own.nodes} | {own.mesh} | {own.hours:.2f} h | {enough.hours:.2f} h |")
    return "\n".join(lines)


def _short(mesh: Mesh) -> str:
    return " × ".join(f"{size} {name}" for name, size in mesh.model_dump().items() if size > 1) or "1"


def _for_7b(gpus: int) -> dict[str, str]:
    return {"train.workers": str(gpus), "generation.replicas": str(gpus)}


def _for_70b(gpus: int) -> dict[str, str]:
    return {
        "generation.engine.tensor_parallel_size": "4", "generation.resources.gpus": "4",
        "generation.replicas": str(gpus // 4), "train.workers": str(gpus),
    }  # fmt: skip


if __name__ == "__main__":
    main()
