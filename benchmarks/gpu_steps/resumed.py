"""One of the two processes of parity's item "resume, deterministic".

    python -m gpu_steps.resumed killed FOLDER [--tiny]       # a step, a checkpoint, a step; then it kills itself
    python -m gpu_steps.resumed continued FOLDER [--tiny]    # takes the second step from that checkpoint

Each prints the second step's loss and the digest of the weights after it as a line of JSON.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from gpu_steps.child import Context
from gpu_steps.learner import BEST, Learner, as_variant, group_of, one_rank
from gpu_steps.parity import make, shards


def main() -> None:
    part, work, *tiny = sys.argv[1:]
    context = Context(tiny=bool(tiny), work=Path(work))
    folder = context.work / "checkpoint-of-the-killed"
    with one_rank(group_of(context)), as_variant(BEST):
        learner = make(context, "bf16", deterministic=True)
        learner.score()
        if part == "killed":
            learner.step()
            learner.backend.save(folder)
        else:
            learner.backend.load(folder)
        loss = learner.step()["loss"]
        print(json.dumps({"loss": loss, "weights": digest_of(learner)}), flush=True)
        if part == "killed":
            os.kill(os.getpid(), signal.SIGKILL)


def digest_of(learner: Learner) -> str:
    found = hashlib.sha256()
    for weight in shards(learner):
        found.update(weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main()
