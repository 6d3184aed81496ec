"""Whole models of iterates that are adapters."""

from pathlib import Path

from spin_ray.inputs.start_model import open_initial
from spin_ray.run_dir.run_dir import RunDir


def write_whole_model(run: RunDir, iterate: int, target: Path) -> None:
    """Merges θ_iterate's checked adapter into its frozen model, in the dtype of exported models.

    Raises:
        RunDirError: a file is missing or has changed.
        ModelError: PEFT is missing.
    """
    import torch

    from spin_ray.learner.adapter_folder import merge

    config, adapter = run.config(), run.adapter(iterate).checked_folder()
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    merge(open_initial(run).path, adapter, target, dtype=dtype, trust_remote_code=config.model.trust_remote_code)
