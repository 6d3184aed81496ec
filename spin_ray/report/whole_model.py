"""Whole models of iterates that are adapters."""

from pathlib import Path

from spin_ray.errors import RunDirError
from spin_ray.inputs.model_folder import open_model
from spin_ray.run_dir.names import iterate_name
from spin_ray.run_dir.run_dir import RunDir


def frozen_model(run: RunDir) -> Path:
    """Returns θ_0's folder on this machine, after checking its digests.

    Raises:
        RunDirError: a file is missing or has changed.
    """
    if run.whole_model(0).is_committed:
        return run.whole_model(0).checked_folder()
    description = run.description()
    trusted = run.config().model.trust_remote_code
    folder = open_model(description["start_model"], iterate_name(0), trust_remote_code=trusted)
    if folder.digest != description["inputs"]["model"]:
        raise RunDirError(f"{folder.path}: is not the model that this run started from; restore it")
    return folder.path


def write_whole_model(run: RunDir, iterate: int, target: Path) -> None:
    """Merges θ_iterate's checked adapter into its frozen model, in the format in which a run exports models.

    Raises:
        RunDirError: a file is missing or has changed.
        ModelError: PEFT is missing.
    """
    import torch

    from spin_ray.learner.adapter_folder import merge

    config, adapter = run.config(), run.adapter(iterate).checked_folder()
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    merge(frozen_model(run), adapter, target, dtype=dtype, trust_remote_code=config.model.trust_remote_code)
