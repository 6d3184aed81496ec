"""A whole iteration (generate, score, 2 epochs) against the authors' logic, on the same prompts, in turns.

    python benchmarks/iteration_against_authors.py --data FILE.jsonl [--batch 24] [--pairs 5] [--max-tokens 64]

The peer is sides/authors_logic.py; in row 3 it generates with this project's vLLM. Both train on the same y′ and must
agree on reference log-probabilities and the first loss. The engine's start is not counted.
"""

import json
import tempfile
from pathlib import Path

from harness import (
    LOSS_TOLERANCE,
    Side,
    at_least,
    check_references,
    pairs_of,
    prepare,
    record,
    side_command,
    training_options,
)

from spin_ray.runtime.cpu import keep_freed_memory

LEARNING_RATE, EPOCHS = 1e-6, 2


def main() -> None:
    parser = training_options(__doc__)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    prepare()
    rows = pairs_of(options.data, options.batch * (options.pairs + 1))
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.json"
        pairs.write_text(json.dumps(rows))

        def side(name: str, *more: str) -> Side:
            return Side(name, side_command(name, pairs, options, *more), keep_freed_memory())

        tokens = ["--max-tokens", str(options.max_tokens)]
        training = ["--learning-rate", str(LEARNING_RATE), "--epochs", str(EPOCHS)]
        with side("opponent", *tokens) as opponent:
            generated = opponent.ready()["generated"]
            pairs.write_text(
                json.dumps([row | {"generated_ids": ids} for row, ids in zip(rows, generated, strict=True)])
            )
            with side("spin_ray_training", *training) as us, side("authors_logic", *training, *tokens) as them:
                check_references(us.ready()["reference"], them.ready()["reference"], options.precision)
                whole, with_vllm = [], []
                for number in range(options.pairs + 1):
                    played, trained, theirs = opponent.turn(number), us.turn(number), them.turn(number)
                    print(json.dumps({"opponent": played, "training": trained, "authors": theirs}), flush=True)
                    if number == 0:
                        assert abs(trained["losses"][0] - theirs["losses"][0]) < LOSS_TOLERANCE[options.precision], (
                            "both sides must take the same step"
                        )
                        continue
                    ours = played["seconds"] + trained["seconds"]
                    whole.append((theirs["generate_s"] + theirs["train_s"]) / ours)
                    with_vllm.append((played["seconds"] + theirs["train_s"]) / ours)
    note = (
        f"{options.batch} rows of {options.data.name} at a time, {options.max_tokens} tokens at most, "
        f"{options.precision}, 2 threads"
    )
    record(
        [
            at_least("2 iteration, times the authors' speed", whole, 8.0, note),
            at_least("3 iteration, times the authors' speed with vLLM", with_vllm, 4.0, note),
        ]
    )


if __name__ == "__main__":
    main()
