"""Where the time of a training step goes: torch's profiler over one optimizer step after two that warm up.

    python benchmarks/training_profile.py --data FILE.jsonl [--batch 24] [--pack-length 1024] [--threads 1]

One thread by default: with more, the profile shows waiting too. The allocator is what train workers get.
"""

import os
import sys

from harness import pairs_of, prepare, table_of, training_options
from sides.spin_ray_training import learner

from spin_ray.runtime.cpu import keep_freed_memory

ROWS = 20
FSDP_RANGES = ("FSDP::pre_forward", "FSDP::pre_backward", "FSDP::post_backward")
"""Ranges that FSDP2 marks in a profile, none within another."""


def main() -> None:
    parser = training_options(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with_allocator()
    prepare()

    from torch.profiler import ProfilerActivity, profile

    from spin_ray.learner.step import Objective, PackShape, pair_lengths, plan, train_step

    table = table_of(pairs_of(options.data, options.batch))
    shape = PackShape(pack_length=options.pack_length, global_batch_pairs=options.batch, pad_id=2)
    backend = learner(options.precision, options.pack_length, learning_rate=1e-6, threads=options.threads)
    ((step,),) = plan(pair_lengths([table]), shape, epochs=1, seed=0)
    # Supervised, as that needs no reference first; y' is packed and computed all the same.
    objective = Objective(loss=None, sft_weight=1.0)
    for _ in range(2):
        train_step(backend, step, table, shape, objective, None)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train_step(backend, step, table, shape, objective, None)
    events = profiler.key_averages()
    print(events.table(sort_by="self_cpu_time_total", row_limit=ROWS, max_name_column_width=50))
    sharding = sum(event.cpu_time_total for event in events if event.key.startswith(FSDP_RANGES))
    everything = sum(event.self_cpu_time_total for event in events)
    print(f"FSDP2's gathering and reducing: {sharding / everything:.3f} of the step")


def with_allocator() -> None:
    """Starts this script again with the environment of a train worker, which a loader reads only at the start."""
    environment = keep_freed_memory()
    if not environment.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)


if __name__ == "__main__":
    main()
