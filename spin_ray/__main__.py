"""The command line, ``spin-ray COMMAND`` or ``python -m spin_ray COMMAND``."""

import inspect
import io
import json
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import click
from click.core import ParameterSource
from rich.console import Console

from spin_ray.config.load import load_config, override, parse_overrides, values_of
from spin_ray.config.paths import is_remote, local_path
from spin_ray.errors import OtherRunError, StageError, UserError
from spin_ray.runtime.garbage import collect_rarely
from spin_ray.runtime.proxies import keep_loopback_from_proxies
from spin_ray.runtime.signals import ending_signals, exit_as_terminated

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
FOLLOW_EVERY_S = 5

_OVERRIDES = {"ignore_unknown_options": True, "allow_extra_args": False}


def _overrides(example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the argument OVERRIDES to a command, and what it is to the command's help."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        command.__doc__ = f"{inspect.getdoc(command)}\n\nOVERRIDES change single values of the recipe: --{example}"
        return click.argument("overrides", nargs=-1, type=click.UNPROCESSED)(command)

    return add


@click.group()
@click.version_option(package_name="spin-ray")
def cli() -> None:
    """Self-play fine-tuning (SPIN) on Ray."""


@cli.command(context_settings=_OVERRIDES, short_help="Write a recipe for model, data and hardware.")
@click.option("--model", default=None, help="Model folder, or owner/name of a hub.")
@click.option("--data", multiple=True, help="Training rows: a file, folder, glob or URI. May be given several times.")
@click.option("--heldout", multiple=True, help="Rows never trained on, as --data. Not given: those beside the data.")
@click.option("--gpu", default=None, help="Type of the GPUs, e.g. A100-80G, or none. Not given: this machine's.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=None, help="GPUs of each machine.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Number of machines.")
@click.option("--sft/--no-sft", default=None, help="Warm-up before SPIN, for a base model.")
@click.option(
    "--from", "source", type=click.Path(path_type=Path), default=None,
    help="SFT or DPO config of TRL, axolotl or LLaMA-Factory to start from.",
)  # fmt: skip
@click.option("--yes", is_flag=True, help="Ask nothing: take what is given or found. So without a terminal.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE] [OVERRIDES]...")
def init(yes: bool, words: tuple[str, ...], **options: Any) -> None:
    """Look at model, data and hardware, write RECIPE (recipe.yaml) to fit them, and say what to run next.

    OVERRIDES are values of the recipe that are kept: --data.columns='{prompt: question}'
    """
    from spin_ray.loop.init.command import Options
    from spin_ray.loop.init.command import init as write_recipe

    ask = None if yes or not sys.stdin.isatty() else lambda question, default: click.prompt(question, default=default)
    recipe = next((word for word in words if not word.startswith("--")), "recipe.yaml")
    overrides = parse_overrides(tuple(word for word in words if word != recipe))
    write_recipe(
        Options(recipe=Path(recipe), values=values_of(overrides), **options), ask, Console(soft_wrap=True, emoji=False)
    )


@cli.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from spin_ray.config.schema import schema_text

    click.echo(schema_text())


@cli.command(short_help="Print the completion of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion of SHELL: eval "$(spin-ray completion bash)" in its start file."""
    from click.shell_completion import get_completion_class

    made: Any = get_completion_class(shell)
    click.echo(made(cli, {}, "spin-ray", "_SPIN_RAY_COMPLETE").source())


@cli.command(context_settings=_OVERRIDES, short_help="Run a recipe, or finish its run.")
@click.argument("recipe")
@click.option("--out", required=True, help="Run folder: made if it is new, resumed if it holds this run.")
@_overrides("train.learning_rate=1e-6")
def run(recipe: str, out: str, overrides: tuple[str, ...]) -> None:
    """Run RECIPE in the folder OUT, or finish what is missing there."""
    config = load_config(recipe, parse_overrides(overrides))
    from spin_ray.loop.launch import run_spin
    from spin_ray.report.status import print_summary

    with _driving(out):
        result = run_spin(config, out)
    print_summary(result.run, Console())


@contextmanager
def _driving(out: str) -> Iterator[None]:
    """Keeps Ray's lines off the terminal, and says what the run folder keeps if the body is stopped."""
    from spin_ray.report.status import what_is_kept
    from spin_ray.runtime.stderr_sorter import sort_stderr

    sort_stderr()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        with suppress(OSError):  # the terminal may be gone
            click.echo(what_is_kept(out), err=True, nl=False)
        raise


@cli.command(short_help="Show the progress of a run.")
@click.argument("run_folder", metavar="RUN")
@click.option("--follow", is_flag=True, help="Show the status again every few seconds while a stage runs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with --follow one a look.")
def status(run_folder: str, follow: bool, as_json: bool) -> None:
    """Show the progress of a run: measures, rates, time left."""
    from spin_ray.report.status import is_running, show_status
    from spin_ray.run_dir.run_dir import open_run

    run, console = open_run(run_folder), Console()
    show_status(run, console, as_json)
    while follow and is_running(run):
        time.sleep(FOLLOW_EVERY_S)
        if not as_json:
            console.clear()
        show_status(run, console, as_json)


@cli.command("eval", short_help="Run lm-eval benchmarks on iterates.")
@click.argument("run_folder", metavar="RUN")
@click.option("--tasks", default="paper", show_default=True, help="Presets (paper, leaderboard-v2), tasks, TASK:SHOTS.")
@click.option(
    "--iterates", "--iterate", default="latest", show_default=True, help="Iterates: sft,iter_000 or 0,1 or latest."
)
@click.option("--include", default=None, help="Folder with tasks of your own in lm-eval's YAML.")
@click.option("--backend", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True, help="Runs the model.")
@click.option("--endpoint", default=None, help="OpenAI-compatible server to ask instead, e.g. http://HOST:8000/v1")
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Number of rows of each task, for a trial.")
@click.option("--chat", is_flag=True, help="Ask each question as a chat message.")
@click.option("--max-length", type=click.IntRange(min=2), default=None, help="Longest question + answer, in tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: results by iterate and task.")
def evaluate(run_folder: str, tasks: str, iterates: str, include: str | None, as_json: bool, **options: Any) -> None:
    """Run lm-eval benchmarks on iterates of RUN and write the results to RUN/<iterate>/eval.json."""
    from spin_ray.report.benchmarks import run_all
    from spin_ray.run_dir.run_dir import open_run

    console = Console(quiet=as_json)
    found = run_all(open_run(run_folder), iterates.split(","), tasks.split(","), include, console, **options)
    if as_json:
        click.echo(json.dumps(found, indent=1))


@cli.command("judge", short_help="Let a model judge between two iterates.")
@click.argument("run_folder", metavar="RUN")
@click.option("--iterates", nargs=2, required=True, metavar="A B", help="Two names, e.g. latest sft.")
@click.option("--endpoint", required=True, help="OpenAI-compatible server of the judge; $OPENAI_API_KEY is its key.")
@click.option("--model", required=True, help="Name of the judge on the server.")
@click.option("--limit", type=click.IntRange(min=1), default=200, show_default=True, help="Number of held-out prompts.")
@click.option("--parallel", type=click.IntRange(min=1), default=8, show_default=True, help="Questions asked at once.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def judge_(run_folder: str, iterates: tuple[str, str], limit: int, as_json: bool, **judging: Any) -> None:
    """Let a model judge between the held-out answers of two iterates, in both orders."""
    from spin_ray.report import judge
    from spin_ray.report.history import find_iterate
    from spin_ray.report.judged import sentences
    from spin_ray.run_dir.names import iterate_name
    from spin_ray.run_dir.run_dir import open_run

    run = open_run(run_folder)
    one, other = (iterate_name(find_iterate(run, iterate)) for iterate in iterates)
    found = judge.run(run, run.config(), one, other, judge.Judge(**judging), limit)
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(sentences(found)))


@cli.command(short_help="Write an HTML page about one run or several.")
@click.argument("run_folders", metavar="RUN...", nargs=-1, required=True)
@click.option("--out", default=None, help="File of the page. Not given: report.html in the first run's folder.")
def report(run_folders: tuple[str, ...], out: str | None) -> None:
    """Write one self-contained HTML page about a run, or several runs to compare. They may still be running."""
    from spin_ray.report.page import report_page, write_report
    from spin_ray.run_dir.run_dir import open_run

    runs = [open_run(folder) for folder in run_folders]
    if out is None:
        runs[0].storage.replace("report.html", report_page(runs).encode())
        click.echo(runs[0].storage.where("report.html"))
    elif is_remote(out):
        raise UserError(f"--out {out}: is no file of this machine; without --out the page goes to the first run")
    else:
        click.echo(write_report(runs, local_path(out)))


@cli.command("export", short_help="Copy a model, or write preference rows.")
@click.argument("run_folder", metavar="RUN")
@click.option("--iterate", default="latest", show_default=True, help="iter_001 (or iter-1, or 1), sft or latest.")
@click.option("--to", "target", required=True, help="An empty folder, or hub:OWNER/NAME; a new file for rows.")
@click.option(
    "--what", type=click.Choice(["model", "pairs", "votes"]), default="model", show_default=True,
    help="The model, the pairs that it was trained on, or the arena's votes.",
)  # fmt: skip
@click.option("--form", type=click.Choice(["trl", "sharegpt"]), default="trl", show_default=True, help="Form of rows.")
@click.option("--serving.votes", "votes", default=None, help="Database of the votes, as the server was given it.")
def export_(run_folder: str, iterate: str, target: str, what: str, form: Any, votes: str | None) -> None:
    """Copy an iterate with a model card to a folder or a Hugging Face hub, or write preference rows to a file."""
    from spin_ray.report.export import export
    from spin_ray.run_dir.run_dir import open_run

    run = open_run(run_folder)
    context = click.get_current_context()
    for option, name, read_by in (
        ("--iterate", "iterate", ("model", "pairs")),
        ("--form", "form", ("pairs", "votes")),
        ("--serving.votes", "votes", ("votes",)),
    ):
        if what not in read_by and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise UserError(f"{option}: is for --what {' and '.join(read_by)}, not {what}")
    if what == "model":
        click.echo(export(run, iterate, target))
        return
    from spin_ray.report import preference_rows as rows

    counts = Counter[str]()
    if what == "pairs":
        found = rows.pairs_of(run, iterate, counts, form)
    else:
        from spin_ray.serving.app import open_votes  # slow: vLLM

        store = open_votes(run, votes)
        context.call_on_close(store.close)
        click.echo(f"votes of {store.where}", err=True)
        found = rows.preferred_of_votes(store.export(), counts, run.config().model.chat_template_kwargs)
    click.echo(rows.write_rows(found, form, target, counts))
    click.echo(rows.said(counts), err=True)


@cli.command(context_settings=_OVERRIDES, short_help="Predict hours and memory of a recipe.")
@click.argument("recipe")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Number of machines.")
@click.option("--gpu", default=None, help="Type of the GPUs, e.g. A100-80G, or none. Not given: no GPUs.")
@click.option(
    "--gpus-per-node", type=click.IntRange(min=1), default=None,
    help="GPUs of each machine. Not given: those that the recipe asks for, 8 at most.",
)  # fmt: skip
@click.option(
    "--network",
    type=click.FloatRange(min=0, min_open=True),
    default=None,
    help="Gb/s between machines: all of a machine's adapters, one direction. Not given: the board's.",
)
@click.option("--rows", type=click.IntRange(min=1), default=None, help="Training rows. Not given: those of the data.")
@click.option("--prompt-tokens", type=click.FloatRange(min=1), default=None, help="Mean length. Not given: measured.")
@click.option("--response-tokens", type=click.FloatRange(min=1), default=None, help="Mean length. Not given: measured.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_overrides("train.workers=16")
def plan(recipe: str, as_json: bool, overrides: tuple[str, ...], **options: Any) -> None:
    """Predict hours and memory of RECIPE, and refuse what cannot fit. Runs nothing."""
    config = load_config(recipe, parse_overrides(overrides))
    from spin_ray.loop.algorithms.table import check_settings, find_algorithm
    from spin_ray.planning.cluster import Cluster, gpus_of_a_node
    from spin_ray.planning.plan import Given, print_plan
    from spin_ray.planning.plan import as_json as plan_as_json

    check_settings(config)
    algorithm = find_algorithm(config.algorithm)
    given = Given(**{name: options.pop(name) for name in ("rows", "prompt_tokens", "response_tokens")})
    cluster = Cluster(**options | {"gpus_per_node": options["gpus_per_node"] or gpus_of_a_node(config)})
    if as_json:
        click.echo(json.dumps(plan_as_json(config, cluster, given, algorithm), indent=1))
    else:
        print_plan(config, cluster, given, algorithm, Console())


@cli.command(context_settings=_OVERRIDES, short_help="Check a recipe before it runs.")
@click.argument("recipe")
@click.option("--out", default=None, help="Run folder, to check its free space and precision.")
@click.option("--all", "every_row", is_flag=True, help="Read every row of the data, not only the first ones.")
@click.option("--no-cluster", is_flag=True, help="Start and join no Ray: the machines of the run are not there yet.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_overrides("train.workers=16")
def doctor(recipe: str, as_json: bool, overrides: tuple[str, ...], **options: Any) -> None:
    """Check RECIPE before it runs: values, data, model, chat template, storage, versions, resources."""
    from spin_ray.loop.doctor import examine

    config = load_config(recipe, parse_overrides(overrides))
    # soft_wrap keeps a long path or reason in one line; quiet keeps --json's object alone.
    found = examine(config, Console(quiet=as_json, soft_wrap=True), **options)
    if as_json:
        click.echo(json.dumps(found, indent=1))


@cli.command(context_settings=_OVERRIDES, short_help="Find out whether anything is left to learn.")
@click.argument("recipe")
@click.option("--out", required=True, help="Run folder, new or of this recipe; `run` goes on in it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@_overrides("probe.prompts=512")
def probe(recipe: str, out: str, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Find out whether θ_0's responses leave anything to learn, by two short trainings. Takes minutes."""
    config = load_config(recipe, parse_overrides(overrides))
    from spin_ray.loop.launch import probe_spin
    from spin_ray.report.probe import print_probe

    with _driving(out):
        found = probe_spin(config, out)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        print_probe(found, Console())


@cli.command(context_settings=_OVERRIDES, short_help="Serve iterates through OpenAI's API.")
@click.argument("run_folder", metavar="RUN")
@click.option("--models", default=None, help="Iterates with an engine: sft,iter-0,latest or all. Default: sft,latest.")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="TCP port on this machine. Default: 8000.")
@_overrides("serving.max_tokens=256")
def serve(run_folder: str, models: str | None, port: int | None, overrides: tuple[str, ...]) -> None:
    """Serve iterates of RUN through OpenAI's API, while RUN trains or afterwards."""
    from spin_ray.run_dir.run_dir import open_run

    run = open_run(run_folder)
    settings = parse_overrides(overrides)
    settings |= {} if models is None else {"serving.models": json.dumps(models.split(","))}
    settings |= {} if port is None else {"serving.port": str(port)}
    config = override(run.config(), settings)
    from spin_ray.serving.iterates import check_models

    check_models(run, config.serving.models)  # before the imports of the server, which take seconds
    from spin_ray.serving.server import serve_run

    serve_run(run, config)


@cli.command(context_settings=_OVERRIDES, short_help="Let iterates answer the same prompts.")
@click.argument("run_folder", metavar="RUN")
@click.option("--prompts", required=True, type=click.Path(path_type=Path), help="JSONL with messages or prompt.")
@click.option("--models", required=True, help="Two or more iterates, e.g. sft,latest.")
@click.option(
    "--out", type=click.File("w", encoding="utf-8"), default="-", help="JSONL of the answers. Not given: stdout."
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=1.0, show_default=True, help="0: likeliest tokens.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Row i has seed + i.")
@click.option("--logprobs", is_flag=True, help="Add each answer's log-probability under each model, and margins.")
@_overrides("serving.resources.gpus=1")
def compare(
    run_folder: str, prompts: Path, models: str, out: IO[str], overrides: tuple[str, ...], **sampling: Any
) -> None:
    """Let iterates of RUN answer the same prompts with the same seeds, side by side."""
    from spin_ray.run_dir.names import api_spelling
    from spin_ray.run_dir.run_dir import open_run

    run = open_run(run_folder)
    names = [api_spelling(model.strip()) for model in models.split(",")]
    config = override(run.config(), parse_overrides(overrides) | {"serving.models": json.dumps(names)})
    from spin_ray.serving.batch import compare_file

    options = sampling | {"models": names}
    click.echo(f"{compare_file(run, config, prompts, options, out)} prompts compared", err=True)


@cli.command("serve-key")
@click.argument("name")
@click.option("--per-minute", type=click.IntRange(min=1), default=None, help="Requests a minute. Default: server's.")
@click.option("--export", "may_export", is_flag=True, help="The key may download the arena's votes and conversations.")
def serve_key(name: str, per_minute: int | None, may_export: bool) -> None:
    """Make an API key. Its line for the key file goes to stdout; the key itself goes to stderr, once."""
    from spin_ray.serving.access import new_key

    key, line = new_key(name, per_minute, may_export=may_export)
    click.echo(line)
    click.echo(f"key of {name}, shown only now: {key}", err=True)


def main() -> None:
    """Runs the command. Exit codes: 0 done, 1 the run failed, 2 bad input, named in one line."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 lacks signs of the tables
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    collect_rarely()
    keep_loopback_from_proxies()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for number in ending_signals():  # Ray, once started, does the same
        signal.signal(number, exit_as_terminated)
    try:
        cli(prog_name="spin-ray", standalone_mode=False)
    except UserError as error:
        _stop(error, EXIT_BAD_INPUT)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_BAD_INPUT)
    except StageError as error:
        _stop(error, EXIT_FAILED)
    except (click.Abort, KeyboardInterrupt, SystemExit) as stopped:
        if isinstance(stopped, SystemExit) and stopped.code != signal.SIGTERM:
            raise
        goes_on = sys.argv[1:2] in (["run"], ["probe"])
        with suppress(OSError):  # the terminal may be gone
            click.echo(f"stopped{'; the same command goes on from what is committed' * goes_on}", err=True)
        sys.exit(EXIT_FAILED)


def _stop(error: Exception, code: int) -> None:
    if isinstance(error, OtherRunError) and sys.stderr.isatty():
        from spin_ray.report.status import print_difference

        print_difference(error, Console(stderr=True))
    else:
        click.echo(f"error: {error}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
