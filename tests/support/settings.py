"""Every section and setting of a recipe."""

from spin_ray.config import recipe, sections
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Section

SECTIONS = sorted(
    {
        value
        for module in (sections, recipe)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Section)
    },
    key=lambda section: section.__name__,
)


def leaves(section: type[Section] = SpinConfig, prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        inner = next(
            (kind for kind in SECTIONS if kind in (field.annotation, *getattr(field.annotation, "__args__", ()))), None
        )
        found += leaves(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return found
