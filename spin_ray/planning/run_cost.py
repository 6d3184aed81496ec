"""Time and memory of a whole run, without reading data, checkpoints and export."""

from dataclasses import dataclass, replace
from math import ceil

from spin_ray.config.recipe import SpinConfig
from spin_ray.planning.cluster import Devices
from spin_ray.planning.generation_cost import generation_cost
from spin_ray.planning.groups import Ranks
from spin_ray.planning.learner_cost import evaluation_cost, scoring_cost, training_cost
from spin_ray.planning.mesh import Choice, Placing, choose_mesh
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.stage_cost import StageCost
from spin_ray.planning.work import Work, pair_packs, played_rows, sft_packs
from spin_ray.run_dir.names import iteration_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The stages of one iteration, or of consecutive iterations of equal cost."""

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
    """Returns the phases of a run."""
    phases: list[Phase] = []
    if config.sft:
        whole = config.with_train(lora=None)
        ranks = ranks_of(whole, shape, devices)
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


def planned_mesh(config: SpinConfig, shape: ModelShape, devices: Devices) -> Choice:
    """Returns the mesh of the train workers and its reason."""
    nodes = tuple(rank // devices.per_node for rank in range(config.train.workers))
    return choose_mesh(config, shape, Placing(node_of_rank=nodes, room=devices.train.memory))


def ranks_of(config: SpinConfig, shape: ModelShape, devices: Devices) -> Ranks:
    return Ranks(mesh=planned_mesh(config, shape, devices).mesh, per_node=devices.per_node)


def iteration_costs(
    config: SpinConfig, shape: ModelShape, devices: Devices, work: Work, iteration: int
) -> tuple[StageCost, ...]:
    """Returns the stages of one iteration. The last iterate is only evaluated."""
    ranks = ranks_of(config, shape, devices)
    trained = iteration < config.iterations
    played = played_rows(config, work) if trained else 0
    heldout = ceil(work.heldout_rows * config.evaluation.samples / config.generation.samples_per_prompt)
    jobs = tuple(count for count in (heldout, played) if count)
    stages = []
    if jobs:
        stages.append(generation_cost(config, shape, devices.generation, work, jobs))
    if work.heldout_rows and iteration:
        stages.append(evaluation_cost(config, shape, devices.train, work, iteration, ranks))
    if trained:
        packs, epochs = pair_packs(config, work, iteration, ranks.mesh.data_ranks), config.at(iteration).epochs
        stages.append(scoring_cost(config, shape, devices.train, packs, ranks))
        stages.append(training_cost(config, shape, devices.train, packs, epochs, config.train.optimizer, ranks))
    return tuple(stages)
