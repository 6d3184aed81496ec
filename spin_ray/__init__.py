"""Self-play fine-tuning (SPIN, arXiv 2401.01335) as one resumable job on Ray.

Example::

    from spin_ray import SpinConfig, run_spin

    config = SpinConfig(model={"path": "sft-model"}, data={"train": "sft.jsonl"}, iterations=2)
    result = run_spin(config, out="runs/first")
    print(result.model)
"""

from spin_ray.config import SpinConfig, load_config
from spin_ray.driver import RunResult, run_spin
from spin_ray.errors import UserError
from spin_ray.run_dir import RunDir

__all__ = ["RunDir", "RunResult", "SpinConfig", "UserError", "load_config", "run_spin"]
