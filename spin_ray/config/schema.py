"""The JSON schema of recipes, for completion, descriptions and checks in editors."""

import json
from typing import Any

from spin_ray.config.load import RECIPES
from spin_ray.config.recipe import SpinConfig

SCHEMA_FILE = RECIPES / "recipe.schema.json"
"""Output of ``spin-ray schema``, beside the recipes that name it."""


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of every setting, without combinations."""
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "spin_ray recipe"}
    return SpinConfig.model_json_schema() | about


def schema_text() -> str:
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False)


def editor_line(schema: str) -> str:
    """Returns the comment that names the schema to editors: a path from the recipe's folder, or a URL."""
    return f"# yaml-language-server: $schema={schema}"
