"""``spin-ray doctor``: all checks of a run, before anything runs."""

from pathlib import Path
from typing import Any

from rich.console import Console

from spin_ray.config.paths import is_remote, local_path
from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.check import check_recipe, find_inputs, versions
from spin_ray.inputs.findings import template_facts
from spin_ray.inputs.graders import graders_of
from spin_ray.inputs.model_folder import refuse_pattern, unopened_files
from spin_ray.inputs.rendering import open_renderer
from spin_ray.loop.algorithms.table import check_algorithm, check_machine, find_algorithm, imported_by_workers
from spin_ray.planning.disk import check_room, disk_use, free_bytes, parameters_of, use_of_run
from spin_ray.planning.hardware import GIB
from spin_ray.planning.mesh import check_mesh
from spin_ray.report import doctor as shown
from spin_ray.report.grading import check_on_workers
from spin_ray.report.tracking import check_trackers
from spin_ray.run_dir.object_storage import open_storage
from spin_ray.run_dir.run_dir import open_run
from spin_ray.runtime.connect import connect
from spin_ray.runtime.gpu_memory import largest_card, memory_here
from spin_ray.runtime.imports import check_imports
from spin_ray.runtime.placement import beyond_this_process, demands, room_for


def examine(
    config: SpinConfig, console: Console, *, out: str | None, every_row: bool, no_cluster: bool
) -> dict[str, Any]:
    """Prints each check that passes; returns the findings.

    Args:
        every_row: True reads all rows, not a sample.
        no_cluster: True leaves out what only the machines of the run can tell: their GPUs, memory and environments.

    Raises:
        UserError: a run would be refused.
    """
    if no_cluster:
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "auto"})})
    check_algorithm(config)
    if out:
        storage = open_storage(out)
        refuse_pattern(storage.root, "--out")
        storage.refuse_missing()
    console.print("[green]ok[/] recipe")
    inputs = find_inputs(config)
    renderer = open_renderer(str(inputs.model.path), config.model)
    tokenizer = renderer.tokenizer
    surveys = shown.look_at_data(config, inputs, every_row=every_row)
    for found in surveys:
        shown.print_survey(found, console)
    for warning in shown.check_surveys(config, inputs, surveys):
        console.print("[yellow]warning[/]", end=" ")
        console.print(warning, markup=False, highlight=False)
    shown.print_example(surveys[0], tokenizer, console)
    start = check_recipe(config, inputs)
    console.print("[green]ok[/] model", end=" ")
    console.print(f"{start.model.path} (end of turn: token {start.end_of_turn_id})", markup=False)
    card, memory = largest_card(config), memory_here(config)
    check_mesh(config, start.model.path, card, find_algorithm(config.algorithm), memory=memory)
    facts = template_facts(renderer.template)
    shown.print_template(facts, console)
    unopened = unopened_files(start.model.path)
    shown.print_findings(start.findings, unopened, console)
    precision, reason = shown.precision_and_reason(config, _recipe_of(out))
    console.print(f"[green]ok[/] precision {precision}: {reason}")
    room = _print_room(config, precision, start.model.path, out, console)
    check_machine(config)
    check_trackers(config)
    for warning in beyond_this_process(config):
        console.print("[yellow]warning[/]", end=" ")
        console.print(warning, markup=False, highlight=False)
    if not no_cluster:
        connect(config)
        with room_for(config):
            check_on_workers(graders_of(config), config.generation.start_timeout_s, start.graded)
            check_imports(imported_by_workers(config), config.generation.start_timeout_s)
    wanted = demands(config)
    for stage, bundles in wanted.items():
        said = "[yellow]not checked[/]" if no_cluster else "[green]ok[/]"
        console.print(f"{said} {stage}: {len(bundles)} × {bundles[0]}")
    console.print(", ".join(f"{name} {number}" for name, number in versions().items()))
    resources = {stage: {"count": len(bundles), "bundle": dict(bundles[0])} for stage, bundles in wanted.items()}
    return shown.as_json(surveys, facts, tokenizer) | {
        "findings": [finding._asdict() for finding in start.findings], "unopened_files": [str(p) for p in unopened],
        "model": str(start.model.path), "end_of_turn_id": start.end_of_turn_id,
        "precision": {"chosen": precision, "reason": reason}, **room,
        "resources": resources, "versions": versions(),
    }  # fmt: skip


def _print_room(
    config: SpinConfig, precision: str, model: Path, out: str | None, console: Console
) -> dict[str, float | None]:
    settled = config.with_train(precision=precision)
    parameters = parameters_of(model)
    use = use_of_run(settled, open_run(out), parameters) if out else disk_use(settled, parameters)
    needed = {"needed_gib": round(use.most / GIB, 1)}
    if out and is_remote(out):
        console.print("[green]ok[/] a store answers:", end=" ")
        console.print(f"{out} (writing not tried)", markup=False)
        return {"free_gib": None, **needed}
    folder = local_path(out or ".")
    free = free_bytes(folder)
    console.print(
        "[green]ok[/] " + (f"{free / GIB:.0f} GiB free for" if free else "a disk that does not tell its room:"), end=" "
    )
    console.print(str(folder), markup=False)
    if warning := check_room(use, folder):
        console.print("[yellow]warning[/]", end=" ")
        console.print(warning, markup=False)
    return {"free_gib": free and round(free / GIB, 1), **needed}


def _recipe_of(out: str | None) -> SpinConfig | None:
    return open_run(out).begun_config() if out else None
