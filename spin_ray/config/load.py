"""Reads recipes: YAML, overrides of single values, and errors that list every problem in plain words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import TAGS
from spin_ray.errors import ConfigError


def load_config(recipe: str | Path, overrides: dict[str, str] | None = None) -> SpinConfig:
    """Reads a recipe and applies ``{"section.field": "YAML value"}`` on top.

    Raises:
        ConfigError: the file cannot be read, or its content is wrong. The message lists every problem.
    """
    try:
        text = Path(recipe).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe}: cannot be read ({error})") from error
    content = _parse_yaml(text, source=str(recipe))
    if not isinstance(content, dict):
        raise ConfigError(f"{recipe}: must hold sections (model, data, …), found {type(content).__name__}")
    for key, text in (overrides or {}).items():
        _set(content, key, text)
    return parse_config(content, source=str(recipe))


def override(config: SpinConfig, overrides: dict[str, str]) -> SpinConfig:
    """Returns ``config`` with ``{"section.field": "YAML value"}`` on top.

    Raises:
        ConfigError: values are wrong. The message lists every problem.
    """
    content = config.model_dump(mode="json")
    for key, text in overrides.items():
        _set(content, key, text)
    return parse_config(content, source="the settings given")


def parse_config(content: dict[str, Any], source: str) -> SpinConfig:
    """Returns the recipe that ``content`` holds.

    Raises:
        ConfigError: values are wrong. The message names ``source`` and lists every problem.
    """
    try:
        return SpinConfig.model_validate(content)
    except ValidationError as error:
        problems = [line for detail in error.errors() for line in _explain(detail)]
        problems += _impossible_besides(content, error.errors())
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


_REASONS = {
    "model_type": "must be a section with fields of its own",
    "string_pattern_mismatch": "must be an import path module:Name, e.g. my_package.mine:Name",
}
"""Plain words for pydantic's types of error, where pydantic's own sentence says less."""


def _explain(detail: Any) -> list[str]:
    where = _where(detail)
    if detail["type"] == "extra_forbidden":
        return [f"{where}: unknown key"]
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"]).split("\n")
    shown = repr(detail["input"])
    given = "" if detail["type"] == "missing" else f" (got {shown if len(shown) <= 80 else shown[:77] + '…'})"
    reason = _REASONS.get(detail["type"], detail["msg"].lower())
    return [f"{where}: {reason}{given}"]


def _where(detail: Any) -> str:
    """Returns the place of an error as the recipe writes it, e.g. ``objective.beta.1``."""
    return ".".join(str(part) for part in detail["loc"] if part not in TAGS)


def _impossible_besides(content: dict[str, Any], details: list[Any]) -> list[str]:
    """Returns the impossible combinations of those values that are right by themselves.

    Pydantic checks no combination while a single value is wrong, so the wrong values are dropped first.
    """
    rest = copy.deepcopy(content)
    doubtful = []
    for detail in details:
        _drop(rest, detail["loc"])
        # An unknown key may be a misspelt field, so nothing is said of the other fields of its section.
        where = _where(detail)
        doubtful.append(where.rpartition(".")[0] if detail["type"] == "extra_forbidden" else where)
    for section, field in (("model", "path"), ("data", "train")):
        rest.setdefault(section, {}).setdefault(field, "")
    try:
        SpinConfig.model_validate(rest)
    except ValidationError as error:
        problems = [line for detail in error.errors() if detail["type"] == "value_error" for line in _explain(detail)]
        return [problem for problem in problems if not any(name in problem for name in doubtful)]
    return []


def _drop(tree: Any, path: tuple[Any, ...]) -> None:
    """Removes the deepest key of ``path`` that ``tree`` has."""
    holder, key = None, None
    for part in path:
        if not isinstance(tree, dict) or part not in tree:
            break
        holder, key, tree = tree, part, tree[part]
    if holder is not None:
        del holder[key]


def _set(content: dict[str, Any], key: str, text: str) -> None:
    *sections, field = key.split(".")
    for section in sections:
        child = content.setdefault(section, {})
        if child is None:
            child = content[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--{key}: {section} is a value, not a section")
        content = child
    content[field] = _parse_yaml(text, source=f"--{key}={text}")


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML passes on the errors of its converters, e.g. ValueError for the date 2024-13-45.
        raise ConfigError(f"{source}: is not YAML: {' '.join(str(error).split())}") from error
