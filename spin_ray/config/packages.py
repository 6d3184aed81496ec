"""Packages of the extras, which only some settings need."""

from importlib.util import find_spec
from typing import Literal

from spin_ray.errors import ConfigError

Extra = Literal["lora", "quantised", "deepspeed", "mlflow", "wandb", "gpu", "cpu"]
_PACKAGES: dict[Extra, list[str]] = {
    "lora": ["peft"],
    "quantised": ["bitsandbytes", "accelerate"],
    "deepspeed": ["deepspeed"],
    "mlflow": ["mlflow"],
    "wandb": ["wandb"],
    "gpu": ["vllm"],
    "cpu": ["vllm"],
}


def check_installed(setting: str, extra: Extra) -> None:
    """Raises ConfigError if a package of an extra is missing. Imports none."""
    for package in _PACKAGES[extra]:
        if find_spec(package) is None:
            raise ConfigError(f"{setting}: needs the package {package}; {install_command(extra)}")


def install_command(extra: Extra) -> str:
    """Returns the command that installs an extra."""
    return f"pip install 'spin-ray[{extra}]'"
