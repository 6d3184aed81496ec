"""Waits until Ray Train's controller knows a checkpoint: a group goes on from the last one that it knows."""

import json
import sys
import time
from pathlib import Path

import ray.cloudpickle

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test's module


def wait_until_heard_of(checkpoints: Path, step: int) -> None:
    """Waits until the group below ``checkpoints`` has registered the checkpoint of ``step``."""
    deadline = time.monotonic() + 60
    while True:
        for snapshot in checkpoints.glob("*/checkpoint_manager_snapshot.json"):
            try:
                latest = json.loads(snapshot.read_text())["latest_checkpoint_result"]
            except ValueError:  # being written
                continue
            if latest and latest["metrics"]["step"] == step:
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited 60 s for {checkpoints} to have the checkpoint of step {step}")
        time.sleep(0.05)
