"""How far is training on a mesh of four workers from training on one, with the same pairs?

Cases are those of tests/unit/learner/test_meshes.py, in fp32.

    python benchmarks/mesh_parity.py [--write]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from spin_ray.runtime import cpu

sys.path.append(str(Path(__file__).parents[1]))

from harness import RESULTS
from tables import MEASURED_PAGE, put

from tests.support.learner_cases import one_rank
from tests.support.mesh_cases import CASES, STEPS, file_of, make_backend, run_four, train


def main() -> None:
    cpu.prepare(threads=1)  # for the processes that are started here
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/measured.md and results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        run_four(directory)
        with one_rank(directory):
            rows = [differences(directory, case) for case in CASES]
    lines = table(rows)
    print(lines)
    if options.write:
        put("parity of the meshes", lines, MEASURED_PAGE)
        found = {"steps": STEPS, "torch": torch.__version__, "rows": rows}
        (RESULTS / "mesh_parity.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def differences(directory: Path, case: tuple[str, str, str]) -> dict[str, Any]:
    """Returns a case's largest differences from one worker, and the largest change of a weight."""
    model, mesh, more = case
    alone = make_backend(directory, model, None, more)
    start = {name: shard.full_tensor().clone() for name, shard in alone._shards.items()}
    expected = train(alone, None, STEPS)
    found = json.loads(Path(f"{file_of(directory, *case)} 0.json").read_text())["history"]
    exported = load_file(Path(f"{file_of(directory, *case)} export") / "model.safetensors")
    mine = {name: shard.full_tensor() for name, shard in alone._shards.items()}
    loss, norm = (
        max(abs(a[what] / b[what] - 1) for a, b in zip(found, expected, strict=True)) for what in ("loss", "grad_norm")
    )
    return {
        "model": model, "mesh": mesh, "with": more, "loss": loss, "gradient norm": norm,
        "weights": max((exported[name] - weight).abs().max().item() for name, weight in mine.items()),
        "moved": max((start[name] - weight).abs().max().item() for name, weight in mine.items()),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | mesh | with | loss, relative | gradient norm, relative | weights | moved |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = " | ".join(f"{row[name]:.1e}" for name in ("loss", "gradient norm", "weights", "moved"))
        lines.append(f"| {row['model']} | {row['mesh']} | {row['with'] or 'rmsprop'} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
