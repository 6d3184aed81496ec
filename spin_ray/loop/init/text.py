"""The recipe that ``init`` writes: YAML with a reason beside each value."""

from typing import Any

import yaml

from spin_ray.config import sections
from spin_ray.config.schema import SCHEMA_FILE, editor_line
from spin_ray.loop.init.settings import Setting, Settings, nested

_COLUMN = 44
"""Column at which reasons begin, unless the value is longer."""


def recipe_text(settings: Settings, head: list[str]) -> str:
    """Returns the text of a recipe that begins with ``head`` as comments."""
    lines = [editor_line(str(SCHEMA_FILE)), *(f"# {line}".rstrip() for line in head)]
    branches = nested(settings)
    for section in sections.Settings.model_fields:
        if section in branches:
            lines += _lines(section, branches[section], "")
    return "\n".join(lines) + "\n"


def _lines(name: str, branch: Any, indent: str) -> list[str]:
    if isinstance(branch, Setting):
        line = f"{indent}{name}: {_yaml(branch.value)}"
        return [f"{line:<{_COLUMN}} # {branch.why}" if branch.why else line]
    inner = [line for key, value in branch.items() for line in _lines(key, value, indent + "  ")]
    return [f"{indent}{name}:" if inner else f"{indent}{name}: {{}}", *inner]


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=2**20, allow_unicode=True)
    return text.removesuffix("...\n").strip()
