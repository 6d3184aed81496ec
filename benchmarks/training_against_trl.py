"""One training epoch against TRL's DPOTrainer: the same pairs, steps, optimizer and precision, in turns.

    python benchmarks/training_against_trl.py --data FILE.jsonl [--batch 24] [--pairs 5] [--pack-length 512]

Needs an environment with TRL (`make peers`). Both sides must agree on the reference log-probability of every response
(0.05 nats; they pad and batch differently) and on the loss of every step (0.005).
"""

import json
import sys
import tempfile
from pathlib import Path

from harness import HERE, MODEL, Side, at_least, at_most, check_references, pairs_of, prepare, record, training_options

from spin_ray.cpu import KEEP_FREED_MEMORY
from spin_ray.embedded import resolve

LEARNING_RATE = 1e-6


def main() -> None:
    parser = training_options(__doc__)
    parser.add_argument("--target", type=float, default=5.0)
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".peers/bin/python", help="a Python that has trl")
    options = parser.parse_args()
    prepare()
    rows = pairs_of(options.data, options.batch * (options.pairs + 1))
    name = options.data.name.partition(".")[0]
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.json"
        pairs.write_text(json.dumps(rows))
        common = [
            "--pairs", str(pairs), "--batch", str(options.batch), "--learning-rate", str(LEARNING_RATE),
        ]  # fmt: skip
        ours = [sys.executable, str(HERE / "sides/spin_ray_training.py"), "--pack-length", str(options.pack_length)]
        theirs = [
            str(options.peers), str(HERE / "sides/trl_dpo.py"), "--model", resolve(MODEL), "--output", f"{folder}/trl",
        ]  # fmt: skip
        with Side("spin_ray", [*ours, *common], KEEP_FREED_MEMORY) as us, Side("trl", [*theirs, *common]) as them:
            check_references(us.ready()["reference"], them.ready()["reference"])
            speeds, lengths = [], []
            for step in range(options.pairs + 1):
                mine, yours = us.turn(step), them.turn(step)
                print(json.dumps({"spin_ray": mine, "trl": yours}), flush=True)
                assert abs(mine["loss"] - yours["loss"]) < 0.005, "both sides must take the same step"
                if step:
                    speeds.append(yours["seconds"] / mine["seconds"])
                    lengths.append(mine["tokens"] / mine["seconds"])
            memory = us.peak_pss_mib / them.peak_pss_mib
    note = f"steps of {options.batch} pairs of {options.data.name}, fp32, 2 threads"
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
