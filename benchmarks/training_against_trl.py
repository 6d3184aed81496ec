"""One training epoch against TRL's DPOTrainer: the same pairs, steps, optimizer and precision, in turns.

    python benchmarks/training_against_trl.py --data FILE.jsonl [--batch 24] [--pairs 5] [--precision bf16]

Needs TRL (`make peers`). Both sides must agree on reference log-probabilities and losses.
"""

import json
import tempfile
from pathlib import Path

from harness import (
    HERE,
    LOSS_TOLERANCE,
    MODEL,
    Side,
    at_least,
    at_most,
    check_references,
    pairs_of,
    prepare,
    record,
    side_command,
    training_options,
)

from spin_ray.inputs.embedded import resolve
from spin_ray.runtime.cpu import keep_freed_memory

LEARNING_RATE = 1e-6
MICRO_BATCH = 8
"""Pairs of TRL's forward pass."""


def main() -> None:
    parser = training_options(__doc__)
    parser.add_argument("--target", type=float, default=5.0)
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".peers/bin/python", help="a Python that has trl")
    options = parser.parse_args()
    if options.batch % MICRO_BATCH:
        parser.error(f"--batch {options.batch}: TRL takes {MICRO_BATCH} pairs at a time; give a multiple of that")
    prepare()
    rows = pairs_of(options.data, options.batch * (options.pairs + 1))
    name = options.data.name.partition(".")[0]
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.json"
        pairs.write_text(json.dumps(rows))
        ours = side_command("spin_ray_training", pairs, options, "--learning-rate", LEARNING_RATE)
        theirs = [
            str(options.peers), str(HERE / "sides/trl_dpo.py"), "--model", resolve(MODEL), "--output", f"{folder}/trl",
            "--pairs", str(pairs), "--batch", str(options.batch), "--learning-rate", str(LEARNING_RATE),
            "--precision", options.precision, "--micro-batch", str(MICRO_BATCH),
        ]  # fmt: skip
        with Side("spin_ray", ours, keep_freed_memory()) as us, Side("trl", theirs) as them:
            check_references(us.ready()["reference"], them.ready()["reference"], options.precision)
            speeds, lengths = [], []
            for step in range(options.pairs + 1):
                mine, yours = us.turn(step), them.turn(step)
                print(json.dumps({"spin_ray": mine, "trl": yours}), flush=True)
                assert abs(mine["loss"] - yours["loss"]) < LOSS_TOLERANCE[options.precision], (
                    "both sides must take the same step"
                )
                if step:
                    speeds.append(yours["seconds"] / mine["seconds"])
                    lengths.append(mine["tokens"] / mine["seconds"])
            memory = us.peak_pss_mib / them.peak_pss_mib
    note = f"steps of {options.batch} pairs of {options.data.name}, {options.precision}, 2 threads"
    record(
        [
            at_least(f"1 training epoch, times TRL's speed ({name})", speeds, options.target, note),
            at_most(
                f"7 training memory, share of TRL's ({name})", [memory], 0.6, f"peak PSS {us.peak_pss_mib:.0f} MiB"
            ),
        ]
    )


if __name__ == "__main__":
    main()
