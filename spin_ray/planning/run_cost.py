"""Time and memory of a whole run, without reading data, checkpoints and export."""

from dataclasses import dataclass, replace
from math import ceil

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh, OptimizerConfig
from spin_ray.planning.cluster import Devices
from spin_ray.planning.generation_cost import generation_cost
from spin_ray.planning.groups import Ranks, flat
from spin_ray.planning.hardware import GB
from spin_ray.planning.learner_cost import FILLED, evaluation_cost, full_memory, scoring_cost, training_cost
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.stage_cost import StageCost
from spin_ray.planning.work import Work, pair_packs, played_rows, sft_packs
from spin_ray.run_dir.names import iteration_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Stages of one iteration, or of equal ones."""

    first: str
    last: str
    count: int
    stages: tuple[StageCost, ...]

    @property
    def name(self) -> str:
        return self.first if self.count == 1 else f"{self.first} to {self.last}"

    @property
    def seconds(self) -> float:
        return self.count * sum(stage.seconds for stage in self.stages)


def plan_run(config: SpinConfig, shape: ModelShape, devices: Devices, work: Work) -> list[Phase]:
    """Returns the driver's stages, iterations of equal cost together."""
    phases: list[Phase] = []
    if config.sft:
        whole = config.model_copy(update={"train": config.train.model_copy(update={"lora": None})})
        ranks, _ = mesh_of(whole, shape, devices, config.sft.optimizer)
        packs = sft_packs(config, work, ranks.mesh.data_ranks)
        warm_up = training_cost(whole, shape, devices.train, packs, config.sft.epochs, config.sft.optimizer, ranks)
        phases.append(Phase(first="sft", last="sft", count=1, stages=(warm_up,)))
    for iteration in range(config.iterations + 1):
        stages = iteration_costs(config, shape, devices, work, iteration)
        name = iteration_name(iteration) if iteration < config.iterations else "last iterate"
        if phases and phases[-1].stages == stages:
            phases[-1] = replace(phases[-1], last=name, count=phases[-1].count + 1)
        elif stages:
            phases.append(Phase(first=name, last=name, count=1, stages=stages))
    return phases


def mesh_of(
    config: SpinConfig, shape: ModelShape, devices: Devices, optimizer: OptimizerConfig | None = None
) -> tuple[Ranks, str]:
    """Returns the mesh of the train workers, and why it is that one."""
    workers, each = config.train.workers, devices.per_node
    if isinstance(config.train.mesh, Mesh):
        return Ranks(mesh=config.train.mesh, per_node=each), "the recipe says so"
    over_all = flat(workers, each)
    if workers <= each:
        return over_all, "all are on one node" if workers > 1 else "there is one worker"
    if workers % each:
        return over_all, f"{workers} workers do not fill nodes of {each}"
    hybrid = Ranks(mesh=Mesh(replicate=workers // each, shard=each), per_node=each)
    needed = full_memory(config, shape, optimizer or config.train.optimizer, hybrid)
    there_are = f"{needed / GB:.0f} GB a device of {devices.train.memory / GB:.0f}"
    if needed <= FILLED * devices.train.memory:
        return hybrid, f"a copy on each node fits ({there_are}), so only gradients cross the network, once a step"
    return over_all, f"a copy on each node would not surely fit ({there_are}), so one is over all workers"


def iteration_costs(
    config: SpinConfig, shape: ModelShape, devices: Devices, work: Work, iteration: int
) -> tuple[StageCost, ...]:
    """Returns the stages of one iteration; the last iterate is only evaluated."""
    ranks, _ = mesh_of(config, shape, devices)
    trained = iteration < config.iterations
    played = played_rows(config, work) if trained else 0
    heldout = ceil(work.heldout_rows * config.heldout_samples / config.generation.samples_per_prompt)
    jobs = tuple(count for count in (heldout, played) if count)
    stages = []
    if jobs:
        stages.append(generation_cost(config, shape, devices.generation, work, jobs))
    if work.heldout_rows and iteration:
        stages.append(evaluation_cost(config, shape, devices.train, work, ranks))
    if trained:
        packs, epochs = pair_packs(config, work, iteration, ranks.mesh.data_ranks), config.at(iteration).epochs
        stages.append(scoring_cost(config, shape, devices.train, packs, ranks))
        stages.append(training_cost(config, shape, devices.train, packs, epochs, config.train.optimizer, ranks))
    return tuple(stages)
