"""Self-play fine-tuning (SPIN, arXiv 2401.01335) as one resumable job on Ray.

Example::

    from spin_ray import load_config, run_spin

    config = load_config({"model": {"path": "sft-model"}, "data": {"train": "sft.jsonl"}, "iterations": 2})
    result = run_spin(config, out="runs/first")
    print(result.model)

What the user can mend is a ``UserError`` of one line; a ``StageError`` is one that a second call may get past.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spin_ray.config.load import load_config
    from spin_ray.config.recipe import SpinConfig
    from spin_ray.errors import StageError, UserError
    from spin_ray.loop.launch import RunResult, probe_spin, run_spin
    from spin_ray.report.export import export
    from spin_ray.run_dir.run_dir import RunDir, open_run

_HOME = {
    "RunDir": "run_dir.run_dir",
    "RunResult": "loop.launch",
    "SpinConfig": "config.recipe",
    "StageError": "errors",
    "UserError": "errors",
    "export": "report.export",
    "load_config": "config.load",
    "open_run": "run_dir.run_dir",
    "probe_spin": "loop.launch",
    "run_spin": "loop.launch",
}

__all__ = [
    "RunDir", "RunResult", "SpinConfig", "StageError", "UserError", "export", "load_config", "open_run", "probe_spin",
    "run_spin",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used: every actor imports this package, few need all of it."""
    if name not in _HOME:
        raise AttributeError(f"module spin_ray has no attribute {name!r}")
    return getattr(import_module(f"spin_ray.{_HOME[name]}"), name)
