"""A setting of a recipe with its reason, as ``init`` collects them."""

from typing import Any, NamedTuple


class Setting(NamedTuple):
    value: Any
    why: str = ""
    """Its comment in the recipe."""


Settings = dict[str, Setting]
"""Settings by place, e.g. ``train.lora.rank``."""


def tree_of(settings: Settings) -> dict[str, Any]:
    """Returns the values as a recipe has them, ``{"train": {"lora": {"rank": 16}}}``."""
    tree: dict[str, Any] = {}
    for place, setting in settings.items():
        *sections, field = place.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[field] = setting.value
    return tree
