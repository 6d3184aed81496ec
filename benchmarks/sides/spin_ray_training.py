"""Side of training benchmarks: this project's learner, one worker, without Ray.

A turn is one optimizer step; with ``--epochs`` it is an iteration's scoring and steps.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu_steps.sizes import table_of
from harness import MODEL, THREADS, replies, side_options, timed

from spin_ray.inputs.embedded import resolve


def main() -> None:
    parser = side_options(__doc__)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--epochs", type=int, default=0, help="of a turn that scores first; 0: a turn is a step")
    options = parser.parse_args()

    import numpy as np
    import torch

    from spin_ray.learner.step import Objective, PackShape, ReferenceScores, pair_lengths, plan, score_rows, train_step

    table = table_of(json.loads(options.pairs.read_text()))
    shape = PackShape(pack_length=options.pack_length, global_batch_pairs=options.batch, pad_id=2)
    backend = learner(options.precision, options.pack_length, options.learning_rate)
    # Steps in the order of the rows, so that both sides see the same pairs in a step.
    parts = [table.slice(start, options.batch) for start in range(0, table.num_rows, options.batch)]
    steps = [plan(pair_lengths([part]), shape, epochs=1, seed=0)[0] for part in parts]

    def score(number: int) -> ReferenceScores:
        order, real, generated = score_rows(backend, steps[number], parts[number], shape)
        by_row = np.argsort(order)
        return ReferenceScores(real=torch.tensor(real)[by_row], generated=torch.tensor(generated)[by_row])

    references = [score(number) for number in range(len(parts))]
    answer, turns = replies(options.reply)
    answer(
        reference=[
            list(pair)
            for scores in references
            for pair in zip(scores.real.tolist(), scores.generated.tolist(), strict=True)
        ]
    )
    objective = Objective(loss="logistic", beta=0.1)
    for number in turns:
        with timed() as spent:
            reference = score(number) if options.epochs else references[number]
            metrics = [
                train_step(backend, steps[number][0], parts[number], shape, objective, reference)
                for _ in range(options.epochs or 1)
            ]
        losses = [step["loss"] for step in metrics]
        answer(**spent, loss=losses[0], losses=losses, tokens=metrics[0]["tokens"], packs=len(steps[number][0].packs))


def learner(precision: str, pack_length: int, learning_rate: float, threads: int = THREADS):
    """Returns the FSDP2 backend of one rank, as in a train worker."""
    import torch
    import torch.distributed as dist

    from spin_ray.config.sections import OptimizerConfig
    from spin_ray.learner.backends.base import BackendSettings
    from spin_ray.learner.backends.fsdp2 import Fsdp2Backend

    torch.set_num_threads(threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    settings = BackendSettings(
        max_length=pack_length, precision=precision, total_steps=10**6, learning_rate=learning_rate,
        optimizer=OptimizerConfig(schedule="constant", warmup_fraction=0),
    )  # fmt: skip
    return Fsdp2Backend(resolve(MODEL), settings, torch.device("cpu"))


if __name__ == "__main__":
    main()
