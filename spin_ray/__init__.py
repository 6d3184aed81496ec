"""Self-play fine-tuning (SPIN, arXiv 2401.01335) as one resumable job on Ray.

Example::

    from spin_ray import SpinConfig, run_spin

    config = SpinConfig(model={"path": "sft-model"}, data={"train": "sft.jsonl"}, iterations=2)
    result = run_spin(config, out="runs/first")
    print(result.model)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spin_ray.config.load import load_config
    from spin_ray.config.recipe import SpinConfig
    from spin_ray.errors import UserError
    from spin_ray.loop.launch import RunResult, run_spin
    from spin_ray.run_dir.run_dir import RunDir

_HOME = {
    "RunDir": "run_dir.run_dir",
    "RunResult": "loop.launch",
    "SpinConfig": "config.recipe",
    "UserError": "errors",
    "load_config": "config.load",
    "run_spin": "loop.launch",
}

__all__ = ["RunDir", "RunResult", "SpinConfig", "UserError", "load_config", "run_spin"]


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used: every actor imports this package, few need all of it."""
    if name not in _HOME:
        raise AttributeError(f"module spin_ray has no attribute {name!r}")
    return getattr(import_module(f"spin_ray.{_HOME[name]}"), name)
