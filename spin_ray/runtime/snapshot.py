"""Ray Train's list of the checkpoints that it keeps, which it writes over in place."""

import json
from collections.abc import Collection
from typing import Any

from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)

SNAPSHOT = CHECKPOINT_MANAGER_SNAPSHOT_FILENAME


def is_readable(content: bytes, folders: Collection[str]) -> bool:
    """Tells whether Ray Train can begin with a snapshot beside ``folders``; else every controller would fail."""
    try:
        state = _CheckpointManagerState.parse_obj(json.loads(content))
    except ValueError:
        return False
    return {kept.checkpoint_dir_name for kept in state.checkpoint_results} <= set(folders)


def snapshot_of(folder: str, metrics: dict[str, Any]) -> bytes:
    """Returns a snapshot with one checkpoint, as after its report."""
    kept = _TrainingResultState(checkpoint_dir_name=folder, metrics=metrics)
    state = _CheckpointManagerState(
        checkpoint_results=[kept],
        checkpoint_report_indices=[0],
        latest_checkpoint_result=kept,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=1,
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    return state.json().encode()
