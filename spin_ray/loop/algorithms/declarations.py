"""Checks of an algorithm's class attributes, and of its methods that read a recipe."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from spin_ray.config.load import fields_of
from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, first_line
from spin_ray.loop.algorithms.base import Algorithm


def check_declarations(algorithm: Algorithm, name: str) -> None:
    """Checks the names in ``needs``, ``reads``, ``objective_fields`` and ``backend_methods``.

    Raises:
        ConfigError: one is no tuple of names, or names no setting.
    """
    for attribute in ("needs", "reads", "objective_fields", "backend_methods"):
        own, given = f"algorithm: {name}: its {attribute}", getattr(algorithm, attribute)
        if not isinstance(given, tuple | list) or not all(isinstance(each, str) for each in given):
            raise ConfigError(f"{own} is {given!r}; give a tuple of names, e.g. ('scorer',)")
        if attribute == "backend_methods":
            continue
        for each in given:
            if wrong := _unknown(f"objective.{each}" if attribute == "objective_fields" else each):
                raise ConfigError(f"{own} names {each!r}, {wrong}")


def _unknown(name: str) -> str:
    """Says what is wrong with the name of a section or of a section's field; empty if nothing is."""
    section, _, field = name.partition(".")
    if section not in SpinConfig.model_fields:
        return _beside(section, SpinConfig.model_fields, "no setting of a recipe")
    known = fields_of(section)
    return _beside(field, known, f"no field of {section}") if field and field not in known else ""


def _beside(name: str, known: Iterable[str], kind: str) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{kind}{hint}; known are {', '.join(sorted(known))}"


@contextmanager
def _named(method: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the algorithm's own code
        raise ConfigError(f"{method} fails ({type(error).__name__}: {first_line(error)})") from error


def problems_of(algorithm: Algorithm, config: SpinConfig) -> Iterator[str]:
    """Yields the algorithm's own problems with a recipe, and a pack that is too short for it.

    Raises:
        ConfigError: ``problems`` or ``least_pack`` fails, or returns something else than it should.
    """
    own = f"algorithm: {config.algorithm}: its"
    with _named(f"{own} problems"):
        found: Any = algorithm.problems(config)
        if isinstance(found, Iterable) and not isinstance(found, str):
            found = list(found)
    with _named(f"{own} least_pack"):
        least: Any = algorithm.least_pack(config)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ConfigError(f"{own} problems gives {found!r}; yield a sentence for each problem")
    if not isinstance(least, int):
        raise ConfigError(f"{own} least_pack gives {least!r}; return a number of tokens")
    yield from found
    if config.train.pack_length < least:
        yield (
            f"train.pack_length: {config.train.pack_length} may not hold a prompt with its responses in algorithm "
            f"{config.algorithm}; raise it to {least}, or lower model.max_length"
        )
