"""The command line: spin-ray run | status | report | export | plan | doctor."""

import logging
import os
import sys
from pathlib import Path

import click
from rich.console import Console

from spin_ray.config import SpinConfig, load_config
from spin_ray.errors import StageError, UserError

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2

_OVERRIDES = {"ignore_unknown_options": True, "allow_extra_args": False}


@click.group()
@click.version_option(package_name="spin-ray")
def cli() -> None:
    """Self-play fine-tuning (SPIN) on Ray."""


@cli.command(context_settings=_OVERRIDES)
@click.argument("recipe")
@click.option("--out", required=True, help="Run directory; made if it is not there, resumed if it is.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def run(recipe: str, out: str, overrides: tuple[str, ...]) -> None:
    """Run RECIPE in the folder OUT, or finish what is missing there.

    OVERRIDES change single values of the recipe: --train.learning_rate=1e-6
    """
    config = load_config(recipe, _parse_overrides(overrides))
    from spin_ray.driver import run_spin
    from spin_ray.summary import print_summary

    result = run_spin(config, out)
    print_summary(result.run, Console())


@cli.command()
@click.argument("run_folder", metavar="RUN")
def status(run_folder: str) -> None:
    """Show what a run has done, and what it is doing."""
    from spin_ray.run_dir import RunDir
    from spin_ray.storage import Storage
    from spin_ray.summary import print_status

    print_status(RunDir(Storage(run_folder)), Console())


@cli.command()
@click.argument("run_folders", metavar="RUN...", nargs=-1, required=True)
@click.option("--out", default=None, help="The page. Not given: report.html in the (first) run's folder.")
def report(run_folders: tuple[str, ...], out: str | None) -> None:
    """Write one self-contained HTML page about a run, or about several to compare. It may still be running."""
    from spin_ray.report import write_report
    from spin_ray.run_dir import RunDir
    from spin_ray.storage import Storage

    runs = [RunDir(Storage(folder)) for folder in run_folders]
    click.echo(write_report(runs, Path(out) if out else runs[0].storage.path("report.html")))


@cli.command("export")
@click.argument("run_folder", metavar="RUN")
@click.option("--iterate", default="latest", show_default=True, help="2 (after two iterations), iter_001, sft, latest.")
@click.option("--to", "target", required=True, help="An empty folder, or hub:OWNER/NAME.")
def export_(run_folder: str, iterate: str, target: str) -> None:
    """Copy an iterate with a model card to a folder or a Hugging Face hub."""
    from spin_ray.export import export
    from spin_ray.run_dir import RunDir
    from spin_ray.storage import Storage

    click.echo(export(RunDir(Storage(run_folder)), iterate, target))


@cli.command(context_settings=_OVERRIDES)
@click.argument("recipe")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option("--gpu", default=None, help="Their GPUs, e.g. A100-80G. Leave out for a recipe that asks for none.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs of a machine.")
@click.option("--rows", type=click.IntRange(min=1), default=None, help="Training rows. Not given: the data's.")
@click.option("--prompt-tokens", type=click.FloatRange(min=1), default=None, help="Mean prompt. Not given: the data's.")
@click.option("--response-tokens", type=click.FloatRange(min=1), default=None, help="Mean human response, likewise.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def plan(
    recipe: str,
    nodes: int,
    gpu: str | None,
    gpus_per_node: int,
    rows: int | None,
    prompt_tokens: float | None,
    response_tokens: float | None,
    overrides: tuple[str, ...],
) -> None:
    """Predict hours and memory of RECIPE, and refuse what cannot fit. Runs nothing.

    OVERRIDES change single values of the recipe: --train.workers=16
    """
    config = load_config(recipe, _parse_overrides(overrides))
    from spin_ray.planning.report import Cluster, Given, print_plan

    cluster = Cluster(nodes=nodes, gpu=gpu, gpus_per_node=gpus_per_node)
    given = Given(rows=rows, prompt_tokens=prompt_tokens, response_tokens=response_tokens)
    print_plan(config, cluster, given, Console())


@cli.command(context_settings=_OVERRIDES)
@click.argument("recipe")
@click.option("--out", default=None, help="Run directory to check for room and for another run.")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def doctor(recipe: str, out: str | None, overrides: tuple[str, ...]) -> None:
    """Check RECIPE before it runs: values, data, model, chat template, storage, versions, resources."""
    config = load_config(recipe, _parse_overrides(overrides))
    _doctor(config, Path(out) if out else None, Console())


def _doctor(config: SpinConfig, out: Path | None, console: Console) -> None:
    from spin_ray.preflight import check_recipe, disk_free_gib, versions
    from spin_ray.resources import check_fits, connect, demands

    console.print("[green]ok[/] recipe")
    start = check_recipe(config)
    console.print(f"[green]ok[/] data {start.train}" + (f", held out {start.heldout}" if start.heldout else ""))
    console.print(f"[green]ok[/] model {start.model.path} (end of turn: token {start.end_of_turn_id})")
    folder = out or Path.cwd()
    console.print(f"[green]ok[/] {disk_free_gib(folder):.0f} GiB free for {folder}")
    connect(config)
    check_fits(config)
    for stage, bundles in demands(config).items():
        console.print(f"[green]ok[/] {stage}: {len(bundles)} × {bundles[0]}")
    console.print(", ".join(f"{name} {number}" for name, number in versions().items()))


def _parse_overrides(words: tuple[str, ...]) -> dict[str, str]:
    overrides = {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals or not key:
            raise UserError(f"{word}: unknown argument; values of the recipe are changed by --section.field=value")
        overrides[key] = value
    return overrides


def main() -> None:
    """Entry point. Exit code 0: done; 2: bad input, one line says what; 1: the run failed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        cli(standalone_mode=False)
    except UserError as error:
        _stop(error, EXIT_BAD_INPUT)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_BAD_INPUT)
    except StageError as error:
        _stop(error, EXIT_FAILED)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped; the same command goes on from what is committed", err=True)
        sys.exit(EXIT_FAILED)


def _stop(error: Exception, code: int) -> None:
    click.echo(f"error: {error}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
