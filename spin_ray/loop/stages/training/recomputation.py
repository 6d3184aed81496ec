"""The choice behind ``train.gradient_checkpointing: auto``, by the memory of the cards that train."""

import logging
from pathlib import Path

import torch
import torch.distributed as dist

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ModelError
from spin_ray.inputs.model_folder import read_config
from spin_ray.planning.hardware import GB
from spin_ray.planning.learner_cost import settle_checkpointing
from spin_ray.planning.model_shape import ModelShape

logger = logging.getLogger(__name__)


def recomputes(config: SpinConfig, optimizer: OptimizerConfig, model: Path, device: torch.device) -> bool:
    """Returns the choice, the same on every rank; a collective on GPUs.

    The workers decide, as the driver may have no card. Elastic groups of fewer workers hold more on each.
    """
    if config.train.gradient_checkpointing != "auto" or device.type == "cpu":
        return config.train.gradient_checkpointing is True
    memory = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    return decide(config, optimizer, model, memory.item(), dist.get_world_size())


def decide(config: SpinConfig, optimizer: OptimizerConfig, model: Path, room: float, workers: int) -> bool:
    """Returns the choice for ``workers`` cards of ``room`` bytes; True for models that the plan does not know."""
    here = config.model_copy(update={"train": config.train.model_copy(update={"workers": workers})})
    try:
        shape = ModelShape.from_config(read_config(model), str(model))
    except ModelError as error:
        logger.warning("train.gradient_checkpointing: on, as its cost without is not known (%s)", error)
        return True
    chosen = settle_checkpointing(here, shape, room, optimizer).train.gradient_checkpointing is True
    how = "are computed again, as they would not fit" if chosen else "fit"
    logger.info("train.gradient_checkpointing: activations %s (cards of %.0f GB)", how, room / GB)
    return chosen
