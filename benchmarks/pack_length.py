"""What does the length of packs cost? Steps of one rank with the same pairs in packs of several lengths, in turns.

    python benchmarks/pack_length.py --data FILE.jsonl [--lengths 512 1024 2048] [--batch 24] [--pairs 5]

Prints, and does not record: seconds of a step beside those at the first length, and peak memory.
"""

import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from harness import HERE, Side, pairs_of, prepare, training_options

from spin_ray.runtime.cpu import keep_freed_memory


def main() -> None:
    parser = training_options(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    options = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        pairs = Path(folder) / "pairs.json"
        pairs.write_text(json.dumps(pairs_of(options.data, options.batch * (options.pairs + 1))))
        command = [
            sys.executable, str(HERE / "sides/spin_ray_training.py"), "--pairs", str(pairs), "--batch",
            str(options.batch), "--precision", options.precision, "--learning-rate", "1e-6", "--pack-length",
        ]  # fmt: skip
        sides = {
            length: stack.enter_context(Side(f"packs_{length}", [*command, str(length)], keep_freed_memory()))
            for length in options.lengths
        }
        for side in sides.values():
            side.ready()
        seconds: dict[int, list[float]] = {length: [] for length in sides}
        for step in range(options.pairs + 1):  # the first warms up
            turns = {length: side.turn(step) for length, side in sides.items()}
            print(json.dumps({length: [round(turn["seconds"], 2), turn["packs"]] for length, turn in turns.items()}))
            for length, turn in turns.items():
                seconds[length] += [turn["seconds"]] if step else []
        first = seconds[options.lengths[0]]
        for length, side in sides.items():
            ratios = [mine / base for mine, base in zip(seconds[length], first, strict=True)]
            print(
                f"packs of {length}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of the "
                f"time at {options.lengths[0]}, peak {side.peak_pss_mib:.0f} MiB"
            )


if __name__ == "__main__":
    main()
