"""The times of the SPIN paper (arXiv 2401.01335) beside predictions."""

from rich.table import Table

from spin_ray.config.recipe import SpinConfig
from spin_ray.planning.cluster import Devices
from spin_ray.planning.hardware import Hardware
from spin_ray.planning.model_shape import MISTRAL_7B, ModelShape
from spin_ray.planning.run_cost import iteration_costs
from spin_ray.planning.work import Planned, Work

PUBLISHED_H = {"generation, 50k prompts": 1.45, "training, 50k pairs": 4.32, "training, 100k pairs": 8.64}
"""Hours on 8 A100 of 80 GB, 7B model, 2 epochs."""
PAPER_GPUS, PAPER_EPOCHS, PAPER_PROMPTS = 8, 2, 50_000
PAPER_GENERATION_BATCH = 16
"""Prompts per GPU and batch (README of uclaml/SPIN, step 1)."""
PAPER_PADDING = 2.0
"""Longest row of a batch over the mean. Assumed: 16 log-normal rows with a sigma of 0.45."""
PAPER_DIFFERENCE = (
    "Why: the authors train y and y′ as two padded rows that each repeat the prompt, with a reference model beside the "
    "policy. Here y and y′ share one prompt in packs, and the reference is one forward pass. The authors generate in "
    "fixed batches with transformers; the prediction does not count the work of its host. What remains between the "
    "first two columns comes from assumptions: row lengths, padding, and the share of the peak that is reached."
)


def is_the_papers(config: SpinConfig, shape: ModelShape, work: Work, device: Hardware) -> bool:
    return (
        shape == MISTRAL_7B
        and device.name == "A100-80G"
        and config.train.workers == config.generation.replicas == PAPER_GPUS
        and work.rows == PAPER_PROMPTS
        and config.train.epochs == PAPER_EPOCHS
        and config.iterations > 1
        and config.algorithm == "spin"
        and config.sft is None
    )


def paper_table(config: SpinConfig, shape: ModelShape, devices: Devices, work: Work, algorithm: Planned) -> Table:
    """Returns published hours, predicted hours of the authors' procedure, and this recipe's."""
    theirs = paper_way_hours(shape, devices.train, work, config.generation.sampling.max_tokens)
    first, second = (
        {stage.name: stage.seconds for stage in iteration_costs(config, shape, devices, work, iteration, algorithm)}
        for iteration in (0, 1)
    )
    ours = [first["generation"], *(stages["scoring"] + stages["training"] for stages in (first, second))]
    table = Table(title="Hours on 8 A100 of 80 GB (published: arXiv 2401.01335)")
    for name in ("", "published", "the authors' way, predicted", "this recipe, predicted"):
        table.add_column(name, justify="right" if name else "left")
    for (name, published), own in zip(PUBLISHED_H.items(), ours, strict=True):
        table.add_row(name, f"{published:.2f}", f"{theirs[name]:.2f}", f"{own / 3600:.2f}")
    return table


def paper_way_hours(shape: ModelShape, device: Hardware, work: Work, max_tokens: int) -> dict[str, float]:
    """Predicts the hours of the authors' procedure, by the keys of ``PUBLISHED_H``.

    Batches are padded to their longest row, and y and y′ are separate rows. The policy with checkpointing costs 4
    forward passes, the reference 1.
    """
    context = work.prompt + max_tokens / 2  # one of 16 responses nearly always reaches max_tokens
    step = device.reading(2 * shape.parameters + PAPER_GENERATION_BATCH * context * shape.kv_bytes(2))
    generation = PAPER_PROMPTS / (PAPER_GPUS * PAPER_GENERATION_BATCH) * max_tokens * step

    row = PAPER_PADDING * (work.prompt + (work.real + work.generated) / 2)
    flops = 5 * shape.trunk_flops(row, row**2 / 2) + 4 * shape.head_flops(row)
    training = PAPER_PROMPTS * PAPER_EPOCHS * 2 * device.seconds(flops, "bf16") / PAPER_GPUS
    hours = (generation / 3600, training / 3600, 2 * training / 3600)
    return dict(zip(PUBLISHED_H, hours, strict=True))
