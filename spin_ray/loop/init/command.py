"""The command ``spin-ray init``."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from spin_ray.config.load import parse_config
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, writing
from spin_ray.inputs.model_folder import is_adapter
from spin_ray.loop.algorithms.table import check_packages, check_settings, find_algorithm
from spin_ray.loop.init.fit import fit
from spin_ray.loop.init.foreign import Foreign
from spin_ray.loop.init.foreign_config import read_foreign
from spin_ray.loop.init.foreign_steps import by_rows
from spin_ray.loop.init.look import Look, Machines, find_machines, heldout_beside, look
from spin_ray.loop.init.settings import Setting, Settings, flattened, tree_of
from spin_ray.loop.init.text import recipe_text
from spin_ray.planning.run_cost import Phase
from spin_ray.report.doctor import histogram, not_read
from spin_ray.run_dir.events import exact_duration

_HELD_OUT = {"data.heldout", "data.heldout_fraction"}
"""Settings of which one gives held-out rows."""
Ask = Callable[[str, str | None], str]
"""Function that asks a person, given a question and a default answer."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's options. None: a person is asked, or the value is detected."""

    recipe: Path
    model: str | None = None
    data: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    gpu: str | None = None
    gpus_per_node: int | None = None
    nodes: int = 1
    sft: bool | None = None
    source: Path | None = None
    """Config of another trainer."""
    values: dict[str, Any] = field(default_factory=dict)
    """Values that the recipe gets as they are, by place, e.g. ``train.workers``."""


def init(options: Options, ask: Ask | None, console: Console) -> None:
    """Writes a checked recipe and prints the next commands.

    Args:
        ask: None if nobody can be asked.

    Raises:
        UserError: an answer is missing, or model, data or foreign config cannot be used.
    """
    if options.recipe.exists():
        raise ConfigError(f"{options.recipe}: exists; move it away or name another file: spin-ray init NEW.yaml")
    if not options.recipe.absolute().parent.is_dir():
        raise ConfigError(f"{options.recipe}: its folder does not exist; make it, or name another file")
    options = replace(options, values=flattened(options.values))
    machines = find_machines(*_hardware(options, ask))
    foreign = read_foreign(options.source, machines.gpus) if options.source else None
    settings = _answers(options, foreign, ask)
    seen = look(settings)
    settings = by_rows(foreign, settings, seen) if foreign else settings
    fitted, phases, misfit = fit(settings, seen, machines, options.values)
    config = parse_config(tree_of(fitted), source=str(options.recipe))
    check_settings(config)
    with writing(options.recipe):
        options.recipe.write_text(recipe_text(fitted, _head(foreign, machines)), encoding="utf-8")
    _print(options, seen, machines, foreign, console)
    _warn(config, fitted, misfit, console)
    _print_next(options, fitted, seen, phases, machines, foreign, console)


_LARGE_WARM_UP = (
    "[yellow]warning[/] the warm-up (sft) trains all weights, which do not fit the card: train.offload puts them into "
    "the machine's memory. Or train an adapter with another tool, and start from that: --model FOLDER --no-sft"
)


def _warn(config: SpinConfig, fitted: Settings, misfit: str, console: Console) -> None:
    try:
        check_packages(config)
    except ConfigError as error:
        said = escape(str(error))
        console.print(f"[yellow]note[/] the recipe's machine needs what is missing here: {said}", highlight=False)
    if "train.offload" in fitted and "train.lora.rank" in fitted and config.sft is not None:
        console.print(_LARGE_WARM_UP, highlight=False)
    if misfit:
        console.print(f"[yellow]warning[/] no settings tried fit: {escape(misfit)}", highlight=False)


def _hardware(options: Options, ask: Ask | None) -> tuple[str | None, int | None, int]:
    gpu, each = options.gpu, options.gpus_per_node
    if gpu is None and ask:
        found = find_machines(None, each, 1)
        gpu = ask("GPU (none, or a type such as A100-80G)", found.cluster.gpu or "none")
        if gpu == (found.cluster.gpu or "none"):
            gpu = None  # the GPU found here, with its number and a note
        elif gpu != "none" and each is None:
            each = _count(ask("GPUs of each machine", "8"))
    return gpu, each, options.nodes


def _count(answer: str) -> int:
    if not answer.strip().isdecimal() or int(answer) < 1:
        raise ConfigError(f"GPUs of each machine: {answer} is no number")
    return int(answer)


def _answers(options: Options, foreign: Foreign | None, ask: Ask | None) -> Settings:
    kept = {place: Setting(value, "given") for place, value in options.values.items()}
    settings = (_still_meant(foreign, options) if foreign else {}) | kept
    settings |= {"iterations": settings.get("iterations", Setting(2, "a finished run goes on if this is raised"))}
    if foreign and foreign.method == "sft" and options.model is None:
        settings = _after_sft(settings, foreign)
    for place, given, question in (
        ("model.path", options.model, "Model (folder, or owner/name of a hub)"),
        ("data.train", _source(options.data), "Training rows (file, folder, glob or URI)"),
    ):
        if given is not None:
            settings[place] = Setting(given)
        elif place not in settings:
            settings[place] = Setting(_asked(place, question, ask, foreign))
    train = settings["data.train"].value
    heldout = _source(options.heldout) or (heldout_beside(train) if isinstance(train, str) else None)
    if not options.heldout and not _HELD_OUT & settings.keys() and ask:
        said = ask("Held-out rows, never trained on (none: nothing is measured)", heldout or "none")
        heldout = None if said == "none" else said
    if heldout and (options.heldout or not _HELD_OUT & settings.keys()):
        settings["data.heldout"] = Setting(heldout, "" if options.heldout else "found beside the training rows")
    return _with_warm_up(settings, options, foreign, ask) | kept


def _still_meant(foreign: Foreign, options: Options) -> Settings:
    """Returns the config's settings without those that belong to a model or to rows given in place of its own."""
    gone: set[str] = set()
    if options.model is not None or "model.path" in options.values:
        gone.add("model.base")
    if options.data or "data.train" in options.values:
        gone.add("data.columns")
        if isinstance(options.values.get("data.train", _source(options.data)), list):
            gone.add("data.max_rows")
    for place in sorted(gone & foreign.settings.keys() - options.values.keys()):
        foreign.left[place] = "belongs to what is given in place of the config's own"
    return {place: setting for place, setting in foreign.settings.items() if place not in gone}


def _source(paths: tuple[str, ...]) -> Any:
    """Returns the value of a setting such as ``data.train``: one path, a list of sources, or None."""
    return [{"path": path} for path in paths] if len(paths) > 1 else next(iter(paths), None)


def _after_sft(settings: Settings, foreign: Foreign) -> Settings:
    made = foreign.output
    if made is None or not any((Path(made) / name).is_file() for name in ("config.json", "adapter_config.json")):
        return settings
    if "model.base" in settings and foreign.fact("new_adapter") and is_adapter(Path(made)):
        foreign.left["output_dir"] = f"{made} is an adapter above another; merge both with your tool to start from it"
        return settings
    foreign.left["learning rate, epochs and batch"] = f"belong to the training that made {made}"
    kept = {place: it for place, it in settings.items() if not place.startswith("sft.") and place != "model.base"}
    return kept | {"model.path": Setting(made, f"what {foreign.file.name} made, so there is no warm-up")}


def _with_warm_up(settings: Settings, options: Options, foreign: Foreign | None, ask: Ask | None) -> Settings:
    if foreign is None:
        sft = options.sft
        if sft is None and ask:
            sft = ask("Is the model fine-tuned on these rows already (yes, no)", "yes").lower().startswith("n")
        if sft:
            settings["sft.epochs"] = Setting(1, "a warm-up on the same rows makes θ_0 from a base model")
    elif options.sft is False:
        return {place: setting for place, setting in settings.items() if not place.startswith("sft.")}
    return settings


def _asked(place: str, question: str, ask: Ask | None, foreign: Foreign | None) -> str:
    option, fact = ("--model", "model") if place == "model.path" else ("--data", "train")
    reason = foreign.reason(fact) if foreign else ""
    if ask is None:
        raise ConfigError(f"{place}: is not given{f' ({reason})' if reason else ''}; add {option}")
    return ask(f"{reason}. {question}" if reason else question, None)


def _head(foreign: Foreign | None, machines: Machines) -> list[str]:
    cluster = machines.cluster
    where = (
        f"{cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu}" if machines.gpus else f"{machines.cpus} CPU cores"
    )
    lines = [f"Written by `spin-ray init` for {where}. Every other setting has its default: `spin-ray schema`."]
    if foreign:
        article = "an" if foreign.method == "sft" else "a"
        lines.append(
            f"From {foreign.file}, {article} {foreign.method.upper()} config of {foreign.tool.name}. Not carried over:"
        )
        lines += [f"  {key}: {' '.join(reason.split())}" for key, reason in foreign.left.items()] or ["  nothing"]
    return lines


def _print(options: Options, seen: Look, machines: Machines, foreign: Foreign | None, console: Console) -> None:
    for found in seen.train:
        form = ", ".join(found.forms)
        console.print(
            f"[green]ok[/] data {escape(found.source)}: form {form}, {found.usable:,} of {found.read:,} rows usable"
        )
        if found.ignored:
            console.print(f"   {not_read(found)}", markup=False, highlight=False, soft_wrap=True)
        for line in histogram(found.lengths):
            console.print(f"   {line}", markup=False, highlight=False)
    for note in (*seen.notes, machines.note):
        if note:
            console.print(f"[yellow]note[/] {escape(note)}", highlight=False)
    if foreign and foreign.left:
        said = f"{foreign.file}: not carried over (reasons in {options.recipe}): {', '.join(foreign.left)}"
        console.print(f"[yellow]note[/] {escape(said)}")
    console.print(f"[green]ok[/] {escape(str(options.recipe))}", highlight=False)


def _print_next(
    options: Options,
    settings: Settings,
    seen: Look,
    phases: list[Phase],
    machines: Machines,
    foreign: Foreign | None,
    console: Console,
) -> None:
    cluster, recipe = machines.cluster, shlex.quote(str(options.recipe))
    out = f"{foreign.output.rstrip('/')}-spin" if foreign and foreign.output else f"runs/{options.recipe.stem}"
    algorithm = find_algorithm(settings.get("algorithm", Setting("spin")).value)
    planned = seen.shape is not None and algorithm.costs_are_known
    hardware = f" --nodes {cluster.nodes} --gpu {cluster.gpu} --gpus-per-node {cluster.gpus_per_node}"
    if phases and seen.rows is not None and planned:
        total = sum(phase.seconds for phase in phases)
        console.print(f"By arithmetic it takes {exact_duration(total)}; `spin-ray plan` says where the time goes.")
    if not _HELD_OUT & settings.keys():
        note = (
            "without data.heldout nothing is measured; data.heldout_fraction: 0.02 holds some of the training rows out"
        )
        console.print(f"[yellow]note[/] {note}", highlight=False)
    plan = f"spin-ray plan {recipe}{hardware if machines.gpus else ''}"
    for words, command in (
        ("Check:", f"spin-ray doctor {recipe}{' --no-cluster' if cluster.nodes > 1 else ''}"),
        *([("Hours:", plan)] if planned else []),
        *_runs(machines, f"{recipe} --out {shlex.quote(out)}"),
    ):
        console.print(f"{words:<7}{command}", markup=False, highlight=False, soft_wrap=True)
    if cluster.nodes > 1:
        console.print("All machines must see recipe, data and --out: docs/launch.md, docs/cluster.md", highlight=False)


def _runs(machines: Machines, arguments: str) -> list[tuple[str, str]]:
    """Returns the commands that start the run. ``spin-ray run`` alone would start a Ray of this machine only."""
    cluster = machines.cluster
    if cluster.nodes == 1:
        return [("Run:", f"spin-ray run {arguments}")]
    gpus = cluster.gpus_per_node if machines.gpus else 0
    return [
        ("Slurm:", f"sbatch --nodes={cluster.nodes} --gpus-per-node={gpus} jobs/slurm/spin.sbatch {arguments}"),
        ("Ray:", f"ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/run_spin.py {arguments}"),
    ]
