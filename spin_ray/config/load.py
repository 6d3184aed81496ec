"""Reads recipes: YAML or mappings, overrides, and clear errors."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import NAME, TAGS, Section
from spin_ray.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
"""Recipes of the package, a link to jobs/recipes."""


def load_config(recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> SpinConfig:
    """Reads a recipe, with overrides ``{"section.field": value}``.

    Args:
        recipe: a file, the name of a recipe of the package, e.g. ``smoke``, or a recipe's content,
            ``{"model": {"path": …}, "data": {"train": …}}``.
        overrides: a text is read as YAML; other values are taken as they are.

    Raises:
        ConfigError: the recipe cannot be read or is wrong; the message lists every problem. ``SpinConfig`` itself
            raises pydantic's errors.
    """
    source = "the recipe" if isinstance(recipe, Mapping) else str(recipe)
    content = _plain(recipe) if isinstance(recipe, Mapping) else _content_of(recipe)
    for key, value in values_of(overrides or {}).items():
        put(content, key, value)
    return parse_config(content, source=source)


def _plain(value: Any) -> Any:
    """Returns a copy of dicts and lists alone, with paths as texts."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _content_of(recipe: str | Path) -> dict[str, Any]:
    if not isinstance(recipe, str | Path):
        raise ConfigError(f"a recipe is a file, a name or a mapping, not {type(recipe).__name__}")
    file = Path(recipe)
    if file.name == str(recipe) and not file.is_file() and (RECIPES / f"{recipe}.yaml").is_file():
        file = RECIPES / f"{recipe}.yaml"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise ConfigError(f"{recipe}: there is no such file; recipes that come with spin_ray: {names}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe}: cannot be read ({error})") from error
    content = _parse_yaml(text, source=str(recipe))
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise ConfigError(f"{recipe}: must hold sections (model, data, …), found {found}")
    return content


def override(config: SpinConfig, overrides: Mapping[str, Any]) -> SpinConfig:
    """Returns ``config`` with the overrides of ``load_config``.

    Raises:
        ConfigError: values are wrong.
    """
    content = config.model_dump(mode="json")
    for key, value in values_of(overrides).items():
        put(content, key, value)
    return parse_config(content, source="the settings given")


def parse_config(content: dict[str, Any], source: str) -> SpinConfig:
    """Checks ``content``; raises ConfigError, which names ``source`` and lists every problem."""
    try:
        return SpinConfig.model_validate(content)
    except ValidationError as error:
        problems = [line for detail in error.errors() for line in _explain(detail)]
        problems += _impossible_besides(content, error.errors())
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error


def parse_overrides(words: tuple[str, ...]) -> dict[str, str]:
    """Parses words like ``--section.field=value`` to ``{"section.field": "YAML value"}``.

    Raises:
        ConfigError: a word has another form.
    """
    overrides = {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals or not key:
            raise ConfigError(f"{word}: unknown argument; values of the recipe are changed by --section.field=value")
        overrides[key] = value
    return overrides


def values_of(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``{"section.field": value}`` with texts read as YAML, a section before its fields.

    Raises:
        ConfigError: a text is no YAML.
    """
    return {
        key: _parse_yaml(value, source=f"--{key}={value}") if isinstance(value, str) else copy.deepcopy(value)
        for key, value in sorted(overrides.items(), key=lambda each: each[0].count("."))
    }


_REASONS = {
    "model_type": "must be a section with fields of its own",
    "string_pattern_mismatch": "must be an import path module:Name, e.g. my_package.mine:Name",
}


def _explain(detail: Any) -> list[str]:
    where = _where(detail)
    if detail["type"] == "extra_forbidden":
        return [f"{where}: unknown key{_meant(where)}"]
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"]).split("\n")
    shown = repr(detail["input"])
    given = "" if detail["type"] == "missing" else f" (got {shown if len(shown) <= 80 else shown[:77] + '…'})"
    reason = _REASONS.get(detail["type"], detail["msg"].lower())
    if NAME in detail["loc"]:
        return [f"{where}: {reason}, or an import path such as my_pkg.mine:name{given}{_with_colon(detail['input'])}"]
    if detail["type"] == "model_type" and detail["input"] is None:
        return [f"{where}: is empty; give it fields, or leave it out"]
    return [f"{where}: {reason}{given}"]


def _with_colon(given: Any) -> str:
    """Returns a hint at the import path that a dotted name was meant to be, if ``given`` is one."""
    if not isinstance(given, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", given):
        return ""
    module, _, name = given.rpartition(".")
    return f" (did you mean {module}:{name}?)"


def _meant(where: str) -> str:
    """Returns a hint at settings of the same name in other sections, or of a similar name."""
    section, _, key = where.replace("-", "_").rpartition(".")
    places = _places()
    if where in places:
        ends = "}" * (section.count(".") + 1)
        return f" (write it as {section.replace('.', ': {')}: {{{key}: …{ends})"
    found = sorted(
        (place for place in places if place.rpartition(".")[2] == key), key=lambda it: not it.startswith("train.")
    )
    if not found:
        found = get_close_matches(key, fields_of(section), n=1, cutoff=0.7)
    return f" (did you mean {' or '.join(found[:2])}?)" if found else ""


def fields_of(section: str) -> list[str]:
    """Returns the fields of a section of a recipe, e.g. ``train.lora``; none of a value."""
    return [place.rpartition(".")[2] for place in _places() if place.rpartition(".")[0] == section]


@cache
def _places() -> tuple[str, ...]:

    def within(annotation: Any, prefix: str) -> Iterator[str]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            for name, field in annotation.model_fields.items():
                yield prefix + name
                yield from within(field.annotation, f"{prefix}{name}.")
        for inner in get_args(annotation):
            yield from within(inner, prefix)

    return tuple(within(SpinConfig, ""))


def _where(detail: Any) -> str:
    return ".".join(str(part) for part in detail["loc"] if part not in TAGS)


def _impossible_besides(content: dict[str, Any], details: list[Any]) -> list[str]:
    """Returns impossible combinations of the right values.

    Wrong values are dropped first, because pydantic checks no combination while a value is wrong.
    """
    rest = copy.deepcopy(content)
    doubtful = []
    for detail in details:
        _drop(rest, detail["loc"])
        # An unknown key may be a misspelt field, so nothing is said about its section.
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
    holder, key = None, None
    for part in path:
        if not isinstance(tree, dict) or part not in tree:
            break
        holder, key, tree = tree, part, tree[part]
    if holder is not None:
        del holder[key]


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets ``section.field`` in a recipe's content.

    Raises:
        ConfigError: a section is a value.
    """
    *sections, field = key.split(".")
    for section in sections:
        child = content.setdefault(section, {})
        if child is None:
            child = content[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--{key}: {section} is a value, not a section")
        content = child
    content[field] = value


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses repeated keys; PyYAML would silently take the last value."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
            keys.add(key.value)
        return node


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML's converters raise their own errors, e.g. ValueError for the date 2024-13-45.
        raise ConfigError(f"{source}: is not YAML: {_what_is_wrong(error)}") from error


def _what_is_wrong(error: Exception) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    place = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    advice = "; indent by blanks, as YAML knows no tabs" if "\\t" in str(error.problem) else ""
    found = f"{error.context} {error.problem}" if str(error.problem).startswith("but") else error.problem
    return f"{found} ({place}){advice}"
