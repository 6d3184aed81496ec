"""Facts of model, data and hardware on this machine."""

from dataclasses import dataclass, replace
from pathlib import Path

from spin_ray.config.load import parse_config
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import name_of, sources_of
from spin_ray.errors import ConfigError, ModelError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.files import SUFFIXES
from spin_ray.inputs.hub import download_command
from spin_ray.inputs.mixture import expected_shares
from spin_ray.inputs.model_folder import (
    folder_here,
    is_adapter,
    name_on_hub,
    positions_of,
    read_config,
    refuse_no_model,
    refuse_untrainable,
)
from spin_ray.inputs.prompt_rows import PromptTask
from spin_ray.inputs.sources import count_rows
from spin_ray.inputs.survey import UNLIMITED, Survey, survey
from spin_ray.loop.init.settings import Setting, Settings, tree_of
from spin_ray.planning.cluster import Cluster, name_of_gpu
from spin_ray.planning.hardware import DEVICE_NAMES, GPUS
from spin_ray.planning.model_shape import KNOWN_SHAPES, ModelShape
from spin_ray.runtime.cpu import usable_cpus
from spin_ray.runtime.gpu import cpu_builds
from spin_ray.runtime.gpu_memory import visible_cards

MOST_CPUS = 4
"""Most CPUs of an engine or worker with a GPU, as in the recipes for eight GPUs."""
_ENVIRONMENT = "torch or vLLM in this environment computes on CPUs alone; run the recipe in that of `make gpu-setup`"
_DRIVER = "torch sees a GPU, but its driver does not tell which (NVML); name it by --gpu and --gpus-per-node"
_HELDOUT = ("heldout", "held_out", "test", "validation", "valid", "val", "eval", "dev")


_OPEN: Settings = {"model.max_length": Setting(2**29), "train.pack_length": Setting(2**30)}
"""Lengths that pass every check, until the real ones are known."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    cluster: Cluster
    cpus: int
    """CPUs of one machine."""
    gpus: int
    """GPUs of all machines."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Look:
    """Facts of model and data; None if they are not on this machine."""

    shape: ModelShape | None = None
    positions: int | None = None
    """Longest input of the model, in tokens."""
    train: tuple[Survey, ...] = ()
    rows: int | None = None
    """Training rows that a run draws from all sources."""
    notes: tuple[str, ...] = ()
    """Sentences about facts that could not be found."""


def find_machines(gpu: str | None, gpus: int | None, nodes: int) -> Machines:
    """Returns the hardware that is given, else this machine's.

    Raises:
        ConfigError: the GPU's name is unknown.
    """
    cpus, note, here = usable_cpus(), "", gpu is None
    if gpu is None:
        gpu, gpus, note = _found_gpu(gpus)
    if gpu == "none":
        return Machines(cluster=Cluster(nodes=nodes, gpu=None), cpus=cpus, gpus=0, note=note)
    gpu = name_of_gpu(gpu)
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu}: unknown; give one of {', '.join(GPUS)}, or none")
    each = gpus or 1
    cpus = cpus if here else MOST_CPUS * each
    return Machines(cluster=Cluster(nodes=nodes, gpu=gpu, gpus_per_node=each), cpus=cpus, gpus=nodes * each, note=note)


def _found_gpu(gpus: int | None) -> tuple[str, int | None, str]:
    """Returns name and number of this machine's GPUs. An unknown GPU counts as the known one next below in memory."""
    cards = visible_cards()
    if not cards:
        return "none", gpus, _DRIVER if _torch_sees_a_card() else ""
    name, memory = cards[0].kind, cards[0].total
    gpus, note = gpus or len(cards), _ENVIRONMENT if cpu_builds() else ""
    if name in DEVICE_NAMES:
        return DEVICE_NAMES[name], gpus, note
    smaller = [card for card in GPUS.values() if card.memory <= 1.05 * memory]
    like = max(smaller, key=lambda card: card.memory) if smaller else min(GPUS.values(), key=lambda card: card.memory)
    unknown = f"{name} is not among the plan's cards; settings are for {like.name}, so watch its memory"
    return like.name, gpus, f"{unknown}; {note}" if note else unknown


def _torch_sees_a_card() -> bool:
    if "torch" in cpu_builds():
        return False
    import torch  # slow

    return torch.cuda.is_available()


def heldout_beside(train: str) -> str | None:
    """Returns a file beside ``train`` with ``test`` or the like in place of ``train`` in its name."""
    file = Path(train)
    if "://" in train or "*" in train or "train" not in file.name:
        return None
    names = (file.with_name(file.name.replace("train", word)) for word in _HELDOUT)
    return next((str(name) for name in names if name.exists() and name.name.endswith(SUFFIXES)), None)


def look(settings: Settings) -> Look:
    """Reads the model's config and the first rows of the data; downloads nothing.

    Raises:
        UserError: model or data cannot be used.
    """
    config = parse_config(tree_of(settings | _OPEN), source="the settings given")
    path = config.model.path
    folder = folder_here(path, config.model.revision)
    if folder is None:
        shape, named = KNOWN_SHAPES.get(path), name_on_hub(path, config.model.revision)
        fitted = "lengths and batches are" if shape else "lengths, batches and memory are"
        note = f"{path} is not on this machine; {fitted} not fitted to it; `{download_command(named)}` and init again"
        return Look(shape=shape, notes=(note,))
    if is_adapter(folder):
        return Look(notes=(f"{path} is an adapter; lengths and batches are not fitted to it and the model below it",))
    refuse_no_model(folder)
    refuse_untrainable(folder)
    model = read_config(folder)
    found = replace(_with_data(config, folder), positions=positions_of(model))
    try:
        return replace(found, shape=ModelShape.from_folder(folder))
    except ModelError as error:
        return replace(found, notes=(*found.notes, f"memory is not known: {error}"))


def _with_data(config: SpinConfig, folder: Path) -> Look:
    if "://" in (train := name_of(config.data.train)):
        return Look(notes=(f"{train} is not on this machine; lengths and batches are not fitted to it",))
    task = replace(PromptTask.of(config, str(folder)), max_length=UNLIMITED, part=None)
    paths = [resolve(source.path) for source in sources_of(config.data.train)]
    found = tuple(survey(path, task, UNLIMITED) for path in paths)
    heldout = config.data.heldout
    sources = sources_of(heldout) if heldout else ()
    beside = [survey(resolve(it.path), task, UNLIMITED) for it in sources if "://" not in it.path]
    for each in (*found, *beside):
        each.check(config.data)
    trained = config.data.trained_fraction
    counts = [round(trained * count_rows(it.files) * len(it.ids) / it.read) for it in found]
    rows = sum(expected_shares(sources_of(config.data.train), counts))
    return Look(train=found, rows=min(rows, config.data.max_rows or rows))
