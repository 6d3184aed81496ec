"""Time and memory of a whole run, without reading data, checkpoints and export."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from spin_ray.config.recipe import SpinConfig
from spin_ray.planning.cluster import Devices
from spin_ray.planning.generation_cost import generation_cost
from spin_ray.planning.groups import Ranks
from spin_ray.planning.hardware import Hardware
from spin_ray.planning.learner_cost import evaluation_cost, scoring_cost, training_cost
from spin_ray.planning.mesh import Choice, Placing, choose_mesh
from spin_ray.planning.model_shape import ModelShape
from spin_ray.planning.stage_cost import StageCost, summed
from spin_ray.planning.work import IterationWork, Planned, Work, epoch_packs, sft_packs
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


def plan_run(config: SpinConfig, shape: ModelShape, devices: Devices, work: Work, algorithm: Planned) -> list[Phase]:
    """Returns the phases of a run."""
    phases: list[Phase] = []
    if config.sft:
        whole = config.with_train(lora=None)
        ranks = ranks_of(whole, shape, devices)
        packs = sft_packs(config, config.sft.global_batch_rows, work, ranks.mesh.data_ranks)
        warm_up = training_cost(whole, shape, devices.train, packs, config.sft.epochs, config.sft.optimizer, ranks)
        phases.append(Phase(first="sft", last="sft", count=1, stages=(replace(warm_up, name="sft training"),)))
    for iteration in range(config.iterations + 1):
        stages = iteration_costs(config, shape, devices, work, iteration, algorithm)
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
    config: SpinConfig, shape: ModelShape, devices: Devices, work: Work, iteration: int, algorithm: Planned
) -> tuple[StageCost, ...]:
    """Returns the stages of one iteration. The last iterate is only evaluated."""
    ranks = ranks_of(config, shape, devices)
    own = algorithm.costs(config, work, iteration) if iteration < config.iterations else None
    played = own.answered if own else 0
    heldout = ceil(work.heldout_rows * config.evaluation.samples / config.generation.samples_per_prompt)
    jobs = tuple(count for count in (heldout, played) if count)
    stages = []
    if jobs:
        stages.append(generation_cost(config, shape, devices.generation, work, jobs))
    if work.heldout_rows and iteration:
        stages.append(evaluation_cost(config, shape, devices.train, work, iteration, ranks))
    if own:
        stages += _learning(config, shape, devices.train, own, config.at(iteration).epochs, ranks)
    return tuple(stages)


def _learning(
    config: SpinConfig, shape: ModelShape, device: Hardware, own: IterationWork, epochs: int, ranks: Ranks
) -> Iterator[StageCost]:
    readers = ranks.mesh.data_ranks
    passes = [scoring_cost(config, shape, device, epoch_packs(config, trees, readers), ranks) for trees in own.scored]
    if passes:
        yield summed(passes)
    packs = epoch_packs(config, own.trained, readers)
    yield training_cost(config, shape, device, packs, epochs, config.train.optimizer, ranks)
