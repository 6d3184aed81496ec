"""Settings of a recipe with their reasons."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

from spin_ray.config.load import put
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Section


class Setting(NamedTuple):
    value: Any
    why: str = ""
    """Comment in the recipe."""


Settings = dict[str, Setting]
"""Settings by place, e.g. ``train.lora.rank``."""


def tree_of(settings: Settings) -> dict[str, Any]:
    """Returns the values as a recipe, e.g. ``{"train": {"lora": {"rank": 16}}}``."""
    return nested({place: setting.value for place, setting in settings.items()})


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``{"a": {"b": 1}}`` for ``{"a.b": 1}``."""
    tree: dict[str, Any] = {}
    for place, value in flat.items():
        put(tree, place, value)
    return tree


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of whole sections: ``{"train.lora": {"rank": 4}}`` becomes ``{"train.lora.rank": 4}``."""
    flat: dict[str, Any] = {}
    for place, value in values.items():
        if value and isinstance(value, Mapping) and _is_section(place):
            flat |= flattened({f"{place}.{name}": inner for name, inner in value.items()})
        else:
            flat[place] = value
    return flat


def is_within(place: str, others: Iterable[str]) -> bool:
    """Tells whether ``place`` is one of the others, or a field of one."""
    return any(f"{place}.".startswith(f"{other}.") for other in others)


def _is_section(place: str) -> bool:
    section: type[Section] | None = SpinConfig
    for name in place.split("."):
        field = section.model_fields.get(name) if section else None
        section = next(_sections_in(field.annotation), None) if field else None
    return section is not None


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)
