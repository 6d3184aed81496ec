"""Every command line in the documentation begins with a known program, and this project's options are ones it takes."""

import re
import shlex
from pathlib import Path

import click
import pytest

from spin_ray.__main__ import cli
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Section
from tests.support.paths import DOCS, ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), ROOT / "benchmarks" / "README.md"])
OTHERS = {
    "cd", "chmod", "chown", "curl", "docker", "export", "git", "helm", "kubectl", "lock.sh", "pip", "pre-commit",
    "pytest", "python", "ray", "sbatch", "sky", "tensorboard",
}  # fmt: skip
"""Programs of others, whose options are theirs."""
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def command_lines(page: Path) -> list[str]:
    """Returns the command lines of a page, continued lines joined: whole blocks that begin with a program."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^    .*\n)+", plain, re.MULTILINE)
    blocks += [block for block in (re.sub("^    ", "", each, flags=re.MULTILINE) for each in indented) if known(block)]
    return [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines() if line.strip()]


def known(line: str) -> bool:
    """Tells whether a line begins with a program, perhaps after assignments."""
    line = re.sub(r"^([A-Z_]+=(\$\(.*\)|\S*)\s*)+", "", line)
    name = (line.split() or ["cd"])[0].rpartition("/")[2]
    return name in OTHERS or name in ("spin-ray", "make")


def called(line: str) -> list[list[str]]:
    """Returns the simple commands of a line that are this project's: ``spin-ray …`` and ``make …``."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an opened quotation goes on in the next line
        words = line.split()
    commands: list[list[str]] = [[]]
    for word in words:
        if word in ("|", "&&", ";", "&", "--", ">", ">>", "<"):
            commands.append([])
        else:
            commands[-1].append(word)
    found = []
    for command in commands:
        while command and re.match(r"[A-Z_]+=", command[0]):
            command = command[1:]
        if command and command[0].rpartition("/")[2] in ("spin-ray", "make"):
            found.append([command[0].rpartition("/")[2], *command[1:]])
    return found


def is_setting(place: str) -> bool:
    section: type[Section] = SpinConfig
    for name in place.split("."):
        if name not in section.model_fields:
            return False
        inner = [kind for kind in _kinds(section.model_fields[name].annotation) if isinstance(kind, type)]
        section = next((kind for kind in inner if issubclass(kind, Section)), Section)
    return True


def _kinds(annotation: object) -> list[object]:
    inner = getattr(annotation, "__args__", ())
    return [annotation, *(kind for each in inner for kind in _kinds(each))]


def problem(command: list[str]) -> str | None:
    program, *words = command
    if program == "make":
        unknown = [word for word in words if "=" not in word and word not in TARGETS]
        return f"no target {unknown[0]}" if unknown else None
    if not words or words[0].startswith("-"):
        return None
    if words[0] not in cli.commands:
        return f"no command {words[0]}"
    return _wrong_option(cli.commands[words[0]], words[1:])


def _wrong_option(command: click.Command, words: list[str]) -> str | None:
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    takes_settings = any(parameter.name in ("overrides", "words") for parameter in command.params)
    for word in words:
        name, equals, _ = word.partition("=")
        if not name.startswith("--") or name in own or name == "--help":
            continue
        if not (takes_settings and equals and is_setting(name.removeprefix("--").rstrip("…"))):
            return f"{command.name} has no option {name}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_name_what_exists(page):
    lines = command_lines(page)
    wrong = [f"{line}: {why}" for line in lines for command in called(line) if (why := problem(command))]
    # A line that is indented goes on with the line before, as the body of a quotation does.
    wrong += [f"{line}: begins with no program" for line in lines if line[0] != " " and not known(line)]
    assert not wrong


def test_the_pages_have_command_lines_and_mistakes_in_them_are_found():
    found = [command for page in PAGES for line in command_lines(page) for command in called(line)]
    assert len(found) > 30 and {command[1] for command in found if command[0] == "spin-ray"} >= {"run", "init", "serve"}
    for line, words in (
        ("FOO=1 .venv/bin/spin-ray runn my.yaml", "no command runn"),
        ("spin-ray run my.yaml --outt runs/my", "run has no option --outt"),
        ("spin-ray run my.yaml --train.learning_rat=1 # why", "run has no option --train.learning_rat"),
        ("git pull && make tests", "no target tests"),
    ):
        (command,) = called(line)
        assert problem(command) == words
    assert problem(["spin-ray", "run", "my.yaml", "--out", "x", "--train.lora.rank=8"]) is None
