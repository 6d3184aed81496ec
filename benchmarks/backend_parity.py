"""How far is DeepSpeed from FSDP2? Three steps on the same pairs, two gloo workers with unequal packs, as a table.

Largest differences over steps and weights, for the cases that tests/unit/test_deepspeed.py checks:

    python benchmarks/backend_parity.py [--write]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch.multiprocessing
from transformers import AutoModelForCausalLM

from spin_ray import cpu

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit"))

from doc_table import put
from learner_cases import save_model, tiny_llama
from test_deepspeed import CASES, one_of_two_ranks


def main() -> None:
    cpu.prepare(threads=1)  # for the processes that are started here
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/cluster.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for start, tied in (("tied", True), ("untied", False)):
            save_model(directory / start, tiny_llama(tied=tied).bfloat16().float())
        torch.multiprocessing.spawn(one_of_two_ranks, args=(directory,), nprocs=2)
        lines = ["| case | loss, relative | gradient norm, relative | weights | moved |", "|---|---|---|---|---|"]
        for case in CASES:
            lines.append(f"| {case} | " + " | ".join(f"{value:.1e}" for value in differences(directory, case)) + " |")
    print("\n".join(lines))
    if options.write:
        put("parity of the backends", "\n".join(lines))


def differences(directory: Path, case: str) -> tuple[float, ...]:
    """Of the losses, the gradient norms and the weights; and how far the weights moved from the start, at most."""
    ours, theirs = (
        json.loads((directory / f"{case} {kind} 0.json").read_text())["history"] for kind in ("deepspeed", "fsdp2")
    )
    start, one, other = (
        dict(AutoModelForCausalLM.from_pretrained(directory / folder, dtype="float32").named_parameters())
        for folder in (case.split()[2], f"{case} deepspeed", f"{case} fsdp2")
    )
    loss, norm = (max(abs(a[i] / b[i] - 1) for a, b in zip(ours, theirs, strict=True)) for i in (0, 1))
    apart = max((one[name] - other[name]).abs().max().item() for name in start)
    moved = max((other[name] - start[name]).abs().max().item() for name in start)
    return loss, norm, apart, moved


if __name__ == "__main__":
    main()
