"""How far is DeepSpeed from FSDP2, and LoRA from PEFT alone, after three steps on the same pairs?

Cases are those of test_deepspeed.py and test_lora.py.

    python benchmarks/backend_parity.py [--write]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.multiprocessing
from transformers import AutoModelForCausalLM

from spin_ray.runtime import cpu

sys.path.append(str(Path(__file__).parents[1]))

from tables import MEASURED_PAGE, put

from tests.support.learner_cases import one_rank, save_model, tiny_llama, train
from tests.unit.learner.test_deepspeed import CASES, one_of_two_ranks
from tests.unit.learner.test_lora import ROWS, backend_of, train_with_peft


def main() -> None:
    cpu.prepare(threads=1)  # for the processes that are started here
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/measured.md")
    parser.add_argument("--adapters-only", action="store_true", help="leave DeepSpeed out")
    options = parser.parse_args()
    tables = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for start, tied in (("tied", True), ("untied", False)):
            save_model(directory / start, tiny_llama(tied=tied).bfloat16().float())
        if not options.adapters_only:
            torch.multiprocessing.spawn(one_of_two_ranks, args=(directory,), nprocs=2)
            tables["parity of the backends"] = table({case: differences(directory, case) for case in CASES})
        tables["parity of adapters"] = table({"FSDP2, adapters of rank 4": peft(directory)})
    for name, lines in tables.items():
        print(lines, end="\n\n")
        if options.write:
            put(name, lines, MEASURED_PAGE)


def table(rows: dict[str, tuple[float, ...]]) -> str:
    lines = ["| case | loss, relative | gradient norm, relative | weights | moved |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {case} | " + " | ".join(map("{:.1e}".format, rows[case])) + " |" for case in rows)])


def peft(directory: Path) -> tuple[float, ...]:
    """Compares adapters on FSDP2 with PEFT in a plain torch loop, in fp32; returns the values of ``differences``."""
    (directory / "alone").mkdir()
    with one_rank(directory / "alone"):
        backend = backend_of(directory / "tied", seed=3)
        theirs, plain, _ = train_with_peft(backend, directory / "tied", 3)
        ours = train(backend, ROWS, 3)
        backend.export_hf(directory / "adapters")
    merged = dict(plain.merge_and_unload().named_parameters())
    one, start = (
        dict(AutoModelForCausalLM.from_pretrained(directory / name, dtype="float32").named_parameters())
        for name in ("adapters", "tied")
    )
    return _apart(ours, theirs, one, merged, start)


def differences(directory: Path, case: str) -> tuple[float, ...]:
    """Returns the largest differences of loss, gradient norm and weights, and the largest change of a weight."""
    ours, theirs = (
        json.loads((directory / f"{case} {kind} 0.json").read_text())["history"] for kind in ("deepspeed", "fsdp2")
    )
    start, one, other = (
        dict(AutoModelForCausalLM.from_pretrained(directory / folder, dtype="float32").named_parameters())
        for folder in (case.split()[2], f"{case} deepspeed", f"{case} fsdp2")
    )
    return _apart(ours, theirs, one, other, start)


def _apart(
    ours: list[list[float]],
    theirs: list[list[float]],
    one: dict[str, Any],
    other: dict[str, Any],
    start: dict[str, Any],
) -> tuple[float, ...]:
    loss, norm = (max(abs(a[i] / b[i] - 1) for a, b in zip(ours, theirs, strict=True)) for i in (0, 1))
    apart = max((one[name] - other[name]).abs().max().item() for name in start)
    moved = max((other[name] - start[name]).abs().max().item() for name in start)
    return loss, norm, apart, moved


if __name__ == "__main__":
    main()
