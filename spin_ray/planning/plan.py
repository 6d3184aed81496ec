"""``spin-ray plan``: predicts time and memory, and refuses what does not fit."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import name_of, sources_of
from spin_ray.errors import ConfigError, DataError, ModelError, ResourceError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.engine_sizes import check_engines
from spin_ray.inputs.hub import download_command
from spin_ray.inputs.model_folder import folder_here, name_on_hub
from spin_ray.planning.cluster import Cluster, Devices, devices_of
from spin_ray.planning.hardware import GB
from spin_ray.planning.mesh import Choice, too_long
from spin_ray.planning.model_shape import KNOWN_SHAPES, ModelShape
from spin_ray.planning.paper import PAPER_DIFFERENCE, is_the_papers, paper_table
from spin_ray.planning.remedies import remedies
from spin_ray.planning.rows import count_responses, first_rows, settle
from spin_ray.planning.run_cost import Phase, plan_run, planned_mesh
from spin_ray.planning.scaling import Scaling, scaling_of
from spin_ray.planning.tables import memory_table, network_note, notes, purposes, scaling_table, time_table
from spin_ray.planning.weights import refuse_unknown_layers
from spin_ray.planning.work import Planned, Work
from spin_ray.run_dir.events import exact_duration
from spin_ray.runtime.precision import with_precision

if TYPE_CHECKING:
    from spin_ray.inputs.prompt_rows import PromptTask


@dataclass(frozen=True, kw_only=True)
class Given:
    """Sizes from the command line. None: measured from the data."""

    rows: int | None = None
    prompt_tokens: float | None = None
    response_tokens: float | None = None


# Inputs


def read_shape(config: SpinConfig) -> ModelShape:
    """Returns the model's shape, by name or from its config.json.

    Raises:
        ModelError: there is neither, or the model is of another kind.
    """
    path = config.model.path
    if path in KNOWN_SHAPES:
        return KNOWN_SHAPES[path]
    folder = folder_here(path, config.model.revision)
    if folder is None:
        named = name_on_hub(path, config.model.revision)
        raise ModelError(
            f"model.path {path}: is not on this machine, and plan asks no hub; `{download_command(named)}`, or put the "
            f"model's config.json into a folder and give --model.path=FOLDER (known by name: {', '.join(KNOWN_SHAPES)})"
        )
    return ModelShape.from_folder(folder)


def read_work(config: SpinConfig, given: Given) -> Work:
    """Returns rows and mean lengths, from the command line or the data.

    Raises:
        DataError: neither gives them.
    """
    rows, prompt, real = given.rows, given.prompt_tokens, given.response_tokens
    generated = rejected = None
    max_tokens = config.generation.sampling.max_tokens
    if rows is None and "://" in name_of(config.data.train):
        rows = config.data.max_rows
    if rows is None or prompt is None or real is None:
        sample = _sample(config, replace(given, rows=rows))
        rows = rows or sample.rows
        prompt = prompt or sample.prompt
        if real is None:
            real, generated, rejected = sample.real, sample.generated, sample.rejected
    return Work(
        rows=rows, prompt=prompt, real=real, generated=generated or min(real, max_tokens),
        heldout_rows=_heldout_rows(config), rejected=rejected,
    )  # fmt: skip


def _sample(config: SpinConfig, given: Given) -> Work:
    train, model = name_of(config.data.train), folder_here(config.model.path, config.model.revision)
    if "://" in train or model is None:
        missing = [f"--{name.replace('_', '-')}" for name, value in vars(given).items() if value is None]
        what = f"data.train {train}" if "://" in train else f"model.path {config.model.path}"
        raise DataError(f"{what}: is not on this machine, so plan cannot measure its rows; give {', '.join(missing)}")
    from spin_ray.inputs.mixture import expected_shares
    from spin_ray.inputs.prompt_rows import PromptTask

    task = PromptTask.of(config, str(model), trained=True)
    sources = sources_of(config.data.train)
    samples = [_usable_rows(resolve(source.path), task) for source in sources]
    shares = expected_shares(sources, [counted for counted, _ in samples])
    rows, max_tokens = sum(shares), config.generation.sampling.max_tokens

    def mean(length: Callable[[dict[str, Any]], int]) -> float:
        each = zip(shares, samples, strict=True)
        return sum(share * sum(map(length, usable)) / len(usable) for share, (_, usable) in each) / rows

    return Work(
        rows=min(config.data.max_rows or rows, rows),
        prompt=mean(lambda row: len(row["prompt_ids"])),
        real=mean(lambda row: len(row["real_ids"])),
        generated=mean(lambda row: min(len(row["real_ids"]), max_tokens)),
        rejected=mean(lambda row: len(row["rejected_ids"])) if task.needs_rejected else None,
    )


def _usable_rows(source: str, task: "PromptTask") -> tuple[int, list[dict[str, Any]]]:
    from spin_ray.inputs.prompt_rows import rows_of
    from spin_ray.inputs.sources import count_rows, find_files

    files = find_files(source)
    rows = first_rows(files, task.data)
    usable = [row for found in rows_of(rows, task) if isinstance(found, list) for row in found]
    if not usable:
        raise DataError(f"{source}: none of the first {len(rows)} rows can be used; spin-ray doctor says why")
    return round(count_rows(files) * len(usable) / len(rows)), usable


def _heldout_rows(config: SpinConfig) -> int:
    """Counts up to ``evaluation.max_rows``. Remote data is assumed to have that many."""
    if not config.data.holds_out:
        return 0
    fraction, limit = config.data.heldout_fraction, config.evaluation.max_rows
    sources = sources_of(config.data.heldout_from)
    paths = [resolve(source.path) for source in sources]
    if any("://" in path for path in paths):
        return limit or (0 if fraction else sum(source.rows or 0 for source in sources))
    from spin_ray.inputs.mixture import expected_shares

    counts = [count_responses(path, config.data) for path in paths]
    counted = round(fraction * sum(counts)) if fraction else sum(expected_shares(sources, counts))
    return min(limit or counted, counted)


# Memory


def check_memory(
    config: SpinConfig, shape: ModelShape, cluster: Cluster, work: Work, algorithm: Planned
) -> list[Phase]:
    """Returns the phases of the run.

    Raises:
        ResourceError: a stage does not fit in memory; the message names settings that would.
    """
    devices = devices_of(config, cluster)
    phases = plan_run(config, shape, devices, work, algorithm)
    failing = next((stage for phase in phases for stage in phase.stages if not stage.fits), None)
    learns = config.train.resources.gpus and (failing is None or failing.name != "generation")
    if learns and (reason := too_long(config, shape, devices.train.memory, algorithm)):
        raise ResourceError(reason)
    if failing is None:
        return phases
    where = cluster.gpu or "the CPU's share of memory"
    wanted = remedies(config, shape, cluster, work, failing.name, algorithm)
    advice = f"it would fit with {' or with '.join(wanted)}" if wanted else "no setting tried makes it fit"
    raise ResourceError(
        f"{failing.name} does not fit on {where}: needs {failing.needed / GB:.1f} GB ({purposes(failing)}), "
        f"there are {failing.room / GB:.1f} GB; {advice}"
    )


# Output


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    config: SpinConfig
    """Recipe with its open settings filled in."""
    cluster: Cluster
    devices: Devices
    shape: ModelShape
    work: Work
    phases: list[Phase]
    scaling: Scaling | None

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def mesh(self) -> Choice:
        return planned_mesh(self.config, self.shape, self.devices)

    @property
    def notes(self) -> list[str]:
        mesh = self.mesh
        found = [f"{mesh}."]
        if self.cluster.nodes > 1:
            found.append(network_note(self.cluster, self.devices))
        found += self.scaling.sentences() if self.scaling else []
        return [*found, *notes(self.config, self.shape, self.cluster, self.devices, mesh.mesh, self.work)]


def print_plan(config: SpinConfig, cluster: Cluster, given: Given, algorithm: Planned, console: Console) -> None:
    """Prints the plan, beside the paper's times where they apply; raises as ``predict`` and prints nothing then."""
    plan = predict(config, cluster, given, algorithm)
    console.print(time_table(plan.phases))
    console.print(f"Total: {exact_duration(plan.seconds)}, without reading data, checkpoints and export.")
    console.print(memory_table(plan.phases))
    if plan.scaling:
        console.print(scaling_table(plan.scaling))
    for note in plan.notes:
        console.print(note, highlight=False, markup=False)
    if is_the_papers(plan.config, plan.shape, plan.work, plan.devices.train):
        console.print(paper_table(plan.config, plan.shape, plan.devices, plan.work, algorithm))
        console.print(PAPER_DIFFERENCE, highlight=False)


def as_json(config: SpinConfig, cluster: Cluster, given: Given, algorithm: Planned) -> dict[str, Any]:
    """Returns the plan in seconds, bytes, tokens and FLOPs; raises as ``predict``."""
    plan = predict(config, cluster, given, algorithm)
    return {
        "seconds": plan.seconds,
        "phases": [asdict(phase) | {"seconds": phase.seconds} for phase in plan.phases],
        "parameters": plan.shape.parameters,
        "work": asdict(plan.work),
        "mesh": {**plan.mesh.mesh.model_dump(), "why": plan.mesh.reason},
        "scaling": plan.scaling.as_json() if plan.scaling else None,
        "notes": plan.notes,
    }


def predict(config: SpinConfig, cluster: Cluster, given: Given, algorithm: Planned) -> Plan:
    """Returns the plan of a recipe.

    Raises:
        UserError: an option is missing, or a stage does not fit.
    """
    if not algorithm.costs_are_known:
        cure = "; override its costs" if ":" in config.algorithm else ""
        raise ConfigError(f"algorithm: plan does not know what {config.algorithm} costs{cure}")
    devices_of(config, cluster)  # refuses before anything is read
    config = with_precision(config)
    shape = read_shape(config)
    check_engines(config, shape.engine_sizes)
    if config.train.lora:
        refuse_unknown_layers(config.train.lora, shape)
    work = read_work(config, given)
    settled = settle(config, work.rows)
    phases = check_memory(settled, shape, cluster, work, algorithm)
    return Plan(
        config=settled, cluster=cluster, devices=devices_of(settled, cluster), shape=shape, work=work, phases=phases,
        scaling=scaling_of(config, shape, cluster, work, algorithm),
    )  # fmt: skip
