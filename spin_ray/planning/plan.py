"""``spin-ray plan``: reads what the cost model needs, refuses what cannot fit in memory, prints the rest.

recipe ──> shape (config.json) ─┐
       ──> rows, lengths        ├──> cost_model ──> does not fit: one line, with settings that would
       ──> hardware            ─┘              └──> fits: a table per iteration
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spin_ray.config.sections import SpinConfig
from spin_ray.errors import ConfigError, DataError, ModelError, ResourceError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.model_folder import read_config
from spin_ray.planning.cost_model import (
    PAPER_EPOCHS,
    PAPER_GPUS,
    PAPER_PROMPTS,
    PUBLISHED_H,
    Devices,
    Phase,
    StageCost,
    Work,
    iteration_costs,
    paper_way_hours,
    plan_run,
)
from spin_ray.planning.hardware import GB, Hardware
from spin_ray.planning.model_shape import KNOWN_SHAPES, MISTRAL_7B, ModelShape
from spin_ray.planning.remedies import Cluster, devices_of, remedies

SAMPLE_ROWS = 256
"""Rows that are rendered and tokenised to learn the mean lengths: about a second's work."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the command line says about the data; None is read from the data."""

    rows: int | None = None
    prompt_tokens: float | None = None
    response_tokens: float | None = None


# Inputs


def read_shape(config: SpinConfig) -> ModelShape:
    """From the model folder's config.json, else from the table of known hub models.

    Raises:
        ModelError: neither is there, or it is no decoder that the cost model knows.
    """
    path = config.model.path
    if path in KNOWN_SHAPES:
        return KNOWN_SHAPES[path]
    folder = Path(resolve(path)).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"model.path {path}: no such folder, and plan asks no hub; put the model's config.json into a folder and "
            f"give --model.path=FOLDER (known by name: {', '.join(KNOWN_SHAPES)})"
        )
    return ModelShape.from_config(read_config(folder), str(folder / "config.json"))


def read_work(config: SpinConfig, given: Given) -> Work:
    """Rows and mean lengths, from the command line or from the first rows of the data.

    Raises:
        DataError: the data is not on this machine, and the command line does not say.
    """
    rows, prompt, real, generated = given.rows, given.prompt_tokens, given.response_tokens, None
    max_tokens = config.generation.sampling.max_tokens
    if rows is None and "://" in config.data.train:
        rows = config.data.max_rows
    if rows is None or prompt is None or real is None:
        sample = _sample(config, replace(given, rows=rows))
        rows = rows or sample.rows
        prompt = prompt or sample.prompt
        if real is None:
            real, generated = sample.real, sample.generated
    return Work(
        rows=rows, prompt=prompt, real=real, generated=generated or min(real, max_tokens),
        heldout_rows=_heldout_rows(config),
    )  # fmt: skip


def _sample(config: SpinConfig, given: Given) -> Work:
    """Means over the first usable rows, by the code that the run itself reads rows with."""
    train, model = resolve(config.data.train), Path(resolve(config.model.path)).expanduser()
    if "://" in train or not model.is_dir():
        missing = [f"--{name.replace('_', '-')}" for name, value in vars(given).items() if value is None]
        what = f"data.train {train}" if "://" in train else f"model.path {config.model.path}"
        raise DataError(f"{what}: is not on this machine, so plan cannot measure rows; give {', '.join(missing)}")
    from spin_ray.inputs.prompt_rows import PromptTask, rows_of
    from spin_ray.inputs.sources import find_files, read_slice, split

    task = PromptTask(
        tokenizer=str(model), chat_template=config.model.chat_template, data=config.data,
        trust_remote_code=config.model.trust_remote_code, max_length=config.model.max_length,
    )  # fmt: skip
    files = find_files(train)
    sources = list(islice((row for piece in split(files) for row in read_slice(piece)), SAMPLE_ROWS))
    usable = [row for found in rows_of(sources, task) if isinstance(found, list) for row in found]
    if not usable:
        raise DataError(f"{train}: none of the first {len(sources)} rows can be used; spin-ray doctor says why")
    counted = round(count_rows(files) * len(usable) / len(sources))
    max_tokens = config.generation.sampling.max_tokens

    def mean(lengths: Iterator[int]) -> float:
        return sum(lengths) / len(usable)

    return Work(
        rows=min(config.data.max_rows or counted, counted),
        prompt=mean(len(row["prompt_ids"]) for row in usable),
        real=mean(len(row["real_ids"]) for row in usable),
        generated=mean(min(len(row["real_ids"]), max_tokens) for row in usable),
    )


def _heldout_rows(config: SpinConfig) -> int:
    """Held-out rows: the file's, at most ``evaluation.max_rows``; that number alone if the data is elsewhere."""
    if config.data.heldout is None:
        return 0
    source, limit = resolve(config.data.heldout), config.evaluation.max_rows
    if "://" in source:
        return limit or 0
    from spin_ray.inputs.sources import find_files

    counted = count_rows(find_files(source))
    return min(limit or counted, counted)


def count_rows(files: list[str]) -> int:
    """Rows of local files: lines that are not blank, or what Parquet's footer says."""
    import pyarrow.parquet as pq

    total = 0
    for file in files:
        if file.endswith(".parquet"):
            total += pq.read_metadata(file).num_rows
        else:
            with open(file, "rb") as lines:
                total += sum(1 for line in lines if line.strip())
    return total


# What cannot fit


def check_memory(config: SpinConfig, shape: ModelShape, cluster: Cluster, work: Work) -> list[Phase]:
    """The plan, if every stage fits in memory.

    Raises:
        ResourceError: one does not; the message has the bytes, what they are for, and settings that were tried and fit.
    """
    phases = plan_run(config, shape, devices_of(config, cluster), work)
    failing = next((stage for phase in phases for stage in phase.stages if not stage.fits), None)
    if failing is None:
        return phases
    where = cluster.gpu or "the CPU's share of memory"
    wanted = remedies(config, shape, cluster, work, failing.name)
    advice = f"it would fit with {' or with '.join(wanted)}" if wanted else "no setting tried makes it fit"
    raise ResourceError(
        f"{failing.name} does not fit on {where}: needs {failing.needed / GB:.1f} GB ({parts(failing)}), "
        f"there are {failing.room / GB:.1f} GB; {advice}"
    )


# Output


def print_plan(config: SpinConfig, cluster: Cluster, given: Given, console: Console) -> None:
    """Time, memory, what to know besides, and the paper's times where they apply.

    Raises:
        UserError: something needed is not given, or a stage does not fit in memory; nothing is printed.
    """
    if config.algorithm != "spin":
        raise ConfigError(f"algorithm: plan knows the costs of spin, not of {config.algorithm}")
    devices = devices_of(config, cluster)
    shape = read_shape(config)
    work = read_work(config, given)
    phases = check_memory(config, shape, cluster, work)
    console.print(_times(phases))
    total = sum(phase.seconds for phase in phases)
    console.print(f"Total: {duration(total)}; reading data, checkpoints and export are not counted.")
    console.print(_memory(phases))
    for note in _notes(config, shape, cluster, work):
        console.print(note, highlight=False, markup=False)
    if _is_the_papers(config, shape, work, devices.train):
        console.print(_against_the_paper(config, shape, devices, work))
        console.print(PAPER_DIFFERENCE, highlight=False)


def _times(phases: list[Phase]) -> Table:
    table = Table(title="Predicted, not measured; each iteration")
    for name in ("", "stage", "tokens", "FLOPs", "time", "bound by"):
        table.add_column(name, justify="right" if name in ("tokens", "FLOPs", "time") else "left")
    for phase in phases:
        for number, stage in enumerate(phase.stages):
            table.add_row(
                "" if number else phase.name,
                stage.name,
                count(stage.tokens),
                f"{stage.flops:.1e}",
                duration(stage.seconds),
                stage.bound,
            )
        table.add_section()
    return table


def _memory(phases: list[Phase]) -> Table:
    """Each stage where it needs the most."""
    table = Table(title="GB on the fullest device")
    for name in ("stage", "needed", "there", "for"):
        table.add_column(name, justify="right" if name in ("needed", "there") else "left")
    largest: dict[str, StageCost] = {}
    for stage in sorted((stage for phase in phases for stage in phase.stages), key=lambda stage: stage.needed):
        largest[stage.name] = stage
    for stage in largest.values():
        table.add_row(stage.name, f"{stage.needed / GB:.1f}", f"{stage.room / GB:.1f}", parts(stage))
    return table


def _notes(config: SpinConfig, shape: ModelShape, cluster: Cluster, work: Work) -> Iterator[str]:
    yield (
        f"Model {shape.parameters / 1e9:.2f}B parameters; {work.rows} rows of {work.prompt:.0f} + {work.real:.0f} "
        f"tokens, y′ {work.generated:.0f} (as long as y, cut at max_tokens); {work.heldout_rows} held-out rows."
    )
    if config.train.backend == "deepspeed":
        loading = config.train.workers * 4 * shape.parameters / min(cluster.nodes, config.train.workers)
        yield (
            f"Host memory: each DeepSpeed worker first loads the model whole in fp32, "
            f"{4 * shape.parameters / GB:.1f} GB, so {loading / GB:.0f} GB per node."
        )
    exported = {"bf16": 2, "fp32": 4}[config.train.precision] * shape.parameters
    yield f"Host memory: the first train worker gathers the model to write it, {exported / GB:.1f} GB."
    if config.model.attention == "padded":
        yield "model.attention: padded takes 2-4 times the hours shown for scoring, training and evaluation."
    if config.data.heldout and not work.heldout_rows:
        yield f"{config.data.heldout} is not here and evaluation.max_rows not set: held-out rows are left out."


def parts(stage: StageCost) -> str:
    """What a stage's memory is for, the largest first; less than 0.05 GB is not worth a word."""
    largest = sorted(stage.memory.items(), key=lambda item: -item[1])
    return ", ".join(f"{size / GB:.1f} {purpose}" for purpose, size in largest if size >= 0.05 * GB) or "under 0.1"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.2f} h"


def count(tokens: float) -> str:
    """1234567 -> ``1.2M``."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.1f}{suffix}"
    return f"{tokens:.0f}"


# The paper

PAPER_DIFFERENCE = (
    "Why: the authors train y and y′ as padded rows that each repeat the prompt, with a reference model beside the "
    "policy; here both share one prompt in packs, and the reference is one forward pass. They generate in fixed "
    "batches with transformers, whose host work the bandwidth bound does not see. What is left between the first two "
    "columns is in the assumptions: row lengths, padding, and the share of the peak that is reached."
)


def _is_the_papers(config: SpinConfig, shape: ModelShape, work: Work, device: Hardware) -> bool:
    """Whether the published times are of this experiment: model, GPUs, prompts and epochs."""
    return (
        shape == MISTRAL_7B
        and device.name == "A100-80G"
        and config.train.workers == config.generation.replicas == PAPER_GPUS
        and work.rows == PAPER_PROMPTS
        and config.train.epochs == PAPER_EPOCHS
        and config.iterations > 1
        and config.sft is None
    )


def _against_the_paper(config: SpinConfig, shape: ModelShape, devices: Devices, work: Work) -> Table:
    """Published hours, the authors' way under this model, and this recipe (scoring counted with training)."""
    theirs = paper_way_hours(shape, devices.train, work, config.generation.sampling.max_tokens)
    first, second = (
        {stage.name: stage.seconds for stage in iteration_costs(config, shape, devices, work, iteration)}
        for iteration in (0, 1)
    )
    ours = [first["generation"], *(stages["scoring"] + stages["training"] for stages in (first, second))]
    table = Table(title="Hours on 8 A100 of 80 GB (published: arXiv 2401.01335)")
    for name in ("", "published", "the authors' way, predicted", "this recipe, predicted"):
        table.add_column(name, justify="right" if name else "left")
    for (name, published), own in zip(PUBLISHED_H.items(), ours, strict=True):
        table.add_row(name, f"{published:.2f}", f"{theirs[name]:.2f}", f"{own / 3600:.2f}")
    return table
