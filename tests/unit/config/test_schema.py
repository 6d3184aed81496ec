"""``spin-ray schema``: the file beside the recipes is what it prints, and recipes validate against it."""

import re
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from spin_ray.__main__ import cli
from spin_ray.config.schema import SCHEMA_FILE, editor_line, recipe_schema
from tests.support.paths import RECIPES

VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())


class Yaml12(yaml.SafeLoader):
    """Reads ``2e-5`` as a number, as editors do; PyYAML's YAML 1.1 wants ``2.0e-5``."""


Yaml12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def problems(recipe: Any) -> list[str]:
    return sorted(error.json_path for error in VALIDATOR.iter_errors(recipe))


def test_the_file_is_what_the_command_prints():
    printed = CliRunner().invoke(cli, ["schema"]).output
    told = "after a change of spin_ray/config: spin-ray schema > jobs/recipes/recipe.schema.json"
    assert SCHEMA_FILE.read_text(encoding="utf-8") == printed, told


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_a_recipe_names_the_schema_and_fits_it(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert text.splitlines()[0] == editor_line(SCHEMA_FILE.name)
    assert problems(yaml.load(text, Yaml12)) == []  # noqa: S506 - a safe loader


def test_mistakes_are_marked_where_they_are():
    """A misspelt key, a value out of range, and a missing section; a list for each iteration is right."""
    recipe = {"model": {"path": "m", "max_lenght": 9}, "train": {"learning_rate": [1e-6, 0], "epochs": [1, 2]}}
    assert problems(recipe) == ["$", "$.model", "$.train.learning_rate"]


def test_every_setting_is_described():
    found = [recipe_schema(), *recipe_schema()["$defs"].values()]
    assert not [name for part in found for name, field in part["properties"].items() if not field.get("description")]
