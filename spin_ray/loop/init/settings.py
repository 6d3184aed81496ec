"""Settings of a recipe with their reasons."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from spin_ray.config.load import fields_of, put


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
        if value and isinstance(value, Mapping) and fields_of(place):
            flat |= flattened({f"{place}.{name}": inner for name, inner in value.items()})
        else:
            flat[place] = value
    return flat
