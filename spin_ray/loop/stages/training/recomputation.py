"""The choice of ``train.gradient_checkpointing: auto`` by the GPUs' memory."""

import logging
from pathlib import Path

import torch
import torch.distributed as dist

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh, OptimizerConfig
from spin_ray.errors import ModelError
from spin_ray.planning.hardware import GB
from spin_ray.planning.learner_cost import settle_checkpointing
from spin_ray.planning.model_shape import ModelShape

logger = logging.getLogger(__name__)


def recomputes(
    config: SpinConfig, optimizer: OptimizerConfig, model: Path, device: torch.device, mesh: Mesh | None = None
) -> bool:
    """Tells whether activations are computed again, a collective on GPUs, so that all ranks agree.

    The workers decide, because the driver may have no GPU and an elastic group may have fewer workers.
    """
    if config.train.gradient_checkpointing != "auto" or device.type == "cpu":
        return config.train.gradient_checkpointing is True
    memory = torch.tensor(torch.cuda.get_device_properties(device).total_memory, device=device)
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    mesh = mesh or Mesh(shard=dist.get_world_size())
    return decide(config, optimizer, model, memory.item(), mesh)


def decide(config: SpinConfig, optimizer: OptimizerConfig, model: Path, room: float, mesh: Mesh) -> bool:
    """Returns the choice for GPUs of ``room`` bytes, True for an unknown model."""
    try:
        shape = ModelShape.from_folder(model)
    except ModelError as error:
        logger.warning("train.gradient_checkpointing: on, as its cost without is not known (%s)", error)
        return True
    chosen = settle_checkpointing(config, shape, room, optimizer, mesh).train.gradient_checkpointing is True
    how = "are computed again, as they would not fit" if chosen else "fit"
    logger.info("train.gradient_checkpointing: activations %s (cards of %.0f GB)", how, room / GB)
    return chosen
