"""A plan as tables and notes for a terminal."""

from collections.abc import Iterator

from rich.table import Table

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh, name_of
from spin_ray.planning.cluster import Cluster, Devices
from spin_ray.planning.disk import DiskUse, disk_use
from spin_ray.planning.hardware import BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY, GB
from spin_ray.planning.learner_cost import most_offloaded_bytes, offload_warning
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.rates import rate_of
from spin_ray.planning.run_cost import Phase
from spin_ray.planning.scaling import Scaling
from spin_ray.planning.stage_cost import StageCost
from spin_ray.planning.weights import weights_of
from spin_ray.planning.work import Work
from spin_ray.run_dir.events import exact_duration


def time_table(phases: list[Phase]) -> Table:
    table = Table(title="Each iteration, predicted (not measured)")
    for name in ("", "stage", "tokens", "FLOPs", "time", "bound by"):
        table.add_column(name, justify="right" if name in ("tokens", "FLOPs", "time") else "left")
    for phase in phases:
        for number, stage in enumerate(phase.stages):
            table.add_row(
                "" if number else phase.name,
                stage.name,
                count(stage.tokens),
                f"{stage.flops:.1e}",
                exact_duration(stage.seconds),
                stage.bound,
            )
        table.add_section()
    return table


def memory_table(phases: list[Phase]) -> Table:
    """Returns each stage's memory, in its largest phase."""
    table = Table(title="GB on the fullest device")
    for name in ("stage", "needed", "available", "for"):
        table.add_column(name, justify="right" if name in ("needed", "available") else "left")
    largest: dict[str, StageCost] = {}
    for stage in sorted((stage for phase in phases for stage in phase.stages), key=lambda stage: stage.needed):
        largest[stage.name] = stage
    for stage in largest.values():
        table.add_row(stage.name, f"{stage.needed / GB:.1f}", f"{stage.room / GB:.1f}", purposes(stage))
    return table


def scaling_table(scaling: Scaling) -> Table:
    """Returns hours by nodes, for the recipe's batch and for one that keeps all nodes busy (–: does not fit)."""
    table = Table(title="Hours on all GPUs of so many nodes, by pairs of a step")
    batches = [scaling.with_own_batch[0].batch, *([] if scaling.scales else [scaling.batch])]
    for name in ("nodes", "mesh", *(f"{batch} pairs" for batch in batches)):
        table.add_column(name, justify="left" if name == "mesh" else "right")
    enough = {size.nodes: f"{size.hours:.2f}" for size in scaling.with_enough}
    for size in scaling.with_own_batch:
        more = [] if scaling.scales else [enough.get(size.nodes, "–")]
        table.add_row(str(size.nodes), size.mesh, f"{size.hours:.2f}", *more)
    return table


def network_note(cluster: Cluster, devices: Devices) -> str:
    rate = devices.train.network * devices.per_node * 8 / GB
    source = "given" if cluster.network else "of the board in planning/hardware.py; --network gives another"
    return (
        f"Network: {rate:.0f} Gb/s of a node, all adapters together, one direction ({source}), of which "
        f"{BANDWIDTH_EFFICIENCY:.0%} are reached: an assumption."
    )


def notes(
    config: SpinConfig, shape: ModelShape, cluster: Cluster, devices: Devices, mesh: Mesh, work: Work
) -> Iterator[str]:
    """Yields the assumptions, and the costs that the tables leave out."""
    rejected = f", rejected responses of {work.rejected:.0f}" if work.rejected else ""
    yield (
        f"Model: {shape.parameters / 1e9:.2f}B parameters. Data: {work.rows} rows of {work.prompt:.0f} + "
        f"{work.real:.0f} tokens{rejected}; y′ of {work.generated:.0f} (as long as y, cut at max_tokens); "
        f"{work.heldout_rows} held-out rows."
    )
    if cluster.gpu:
        yield from _rates(config, shape, cluster.gpu)
    use = disk_use(config, shape.parameters)
    yield from _host_memory(config, shape, devices, mesh, use)
    yield f"Disk of the run: {use}."
    tokens = config.train.global_batch_pairs / mesh.data_ranks * (work.prompt + work.real + work.generated)
    trained = weights_of(config, shape).trained
    if warning := offload_warning(config, trained, tokens / config.train.pack_length, mesh):
        yield f"{warning}."
    if config.train.lora and config.train.lora.is_quantised:
        yield f"train.lora.base: {config.train.lora.base}: the hours shown do not count the time of dequantising."
    if config.model.attention == "padded":
        yield "model.attention: padded makes scoring, training and evaluation take 2-4 times the hours shown."
    if config.data.holds_out and not work.heldout_rows:
        heldout = name_of(config.data.heldout_from)
        yield f"Held-out rows are not counted: {heldout} is not on this machine and evaluation.max_rows is not set."


def _host_memory(config: SpinConfig, shape: ModelShape, devices: Devices, mesh: Mesh, use: DiskUse) -> Iterator[str]:
    whole, train = 4 * shape.parameters, config.train
    workers = min(devices.per_node, train.workers)
    if train.backend == "deepspeed":
        yield (
            f"Host memory: each DeepSpeed worker first loads the whole model in fp32, {whole / GB:.1f} GB, so "
            f"{workers * whole / GB:.0f} GB per node."
        )
    elif train.workers == 1 and (train.lora is None or config.sft):
        yield f"Host memory: the train worker first loads the whole model in fp32, {whole / GB:.1f} GB."
    if train.offload and train.resources.gpus:
        each = most_offloaded_bytes(config, shape, mesh)
        yield (
            f"Host memory: train.offload keeps the train workers' weights, gradients and optimizer states there, "
            f"{each / GB:.1f} GB each and {workers * each / GB:.0f} GB per node, which the system cannot swap out."
        )
    if use.models:
        yield f"Host memory: the first train worker gathers the model to write it, {use.model / GB:.1f} GB."


def _rates(config: SpinConfig, shape: ModelShape, gpu: str) -> Iterator[str]:
    assumed = []
    for stage in ("training", "scoring"):
        rate = rate_of(gpu, stage, shape.parameters) if config.train.precision == "bf16" else None
        if rate:
            yield f"Rate of {stage}: {rate.mfu:.2f} of the data sheet's, measured ({rate})."
        else:
            assumed.append(stage)
    yield (
        f"Rate of {', '.join([*assumed, 'generation'])}: {COMPUTE_EFFICIENCY:.2f} of the data sheet's, an assumption; "
        f"not measured on {gpu} for a model of this size."
    )


def purposes(stage: StageCost) -> str:
    largest = sorted(stage.memory.items(), key=lambda item: -item[1])
    return ", ".join(f"{size / GB:.1f} {purpose}" for purpose, size in largest if size >= 0.05 * GB) or "under 0.1"


def count(tokens: float) -> str:
    """Shortens a number: 1234567 -> ``1.2M``."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.1f}{suffix}"
    return f"{tokens:.0f}"
