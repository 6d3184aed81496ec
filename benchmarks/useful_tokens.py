"""How many tokens does training compute for each token that it must: every prompt once, every response once?

    python benchmarks/useful_tokens.py --data FILE.jsonl [--rows 2000] [--batch 24] [--pack-length 512]

Deterministic: the packs of a whole epoch are built, nothing is trained.
"""

import argparse
from pathlib import Path

from harness import at_most, pairs_of, record, table_of

from spin_ray.learner.step import PackShape, pair_lengths, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows with messages, one JSON object a line")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=24, help="pairs of a step")
    parser.add_argument("--pack-length", type=int, default=512)
    options = parser.parse_args()
    rows = pairs_of(options.data, options.rows)
    table = table_of(rows)
    shape = PackShape(pack_length=options.pack_length, global_batch_pairs=options.batch, pad_id=2)
    (steps,) = plan(pair_lengths([table]), shape, epochs=1, seed=0)
    computed = sum(len(shape.build(pack, table).input_ids) for step in steps for pack in step.packs)
    least = sum(len(ids) for row in rows for ids in row.values())
    note = f"{len(rows)} pairs of {options.data.name}, {options.batch} a step, packs of {options.pack_length}"
    record(
        [
            at_most(
                f"6 tokens computed, times the least ({options.data.name.partition('.')[0]})",
                [computed / least],
                1.05,
                note,
            )
        ]
    )


if __name__ == "__main__":
    main()
