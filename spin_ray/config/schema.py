"""The JSON schema of recipes, by which editors complete keys, show descriptions and mark mistakes."""

import json
from typing import Any

from spin_ray.config.load import RECIPES
from spin_ray.config.recipe import SpinConfig

SCHEMA_FILE = RECIPES / "recipe.schema.json"
"""What ``spin-ray schema`` prints, beside the recipes that name it."""


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) of every setting; combinations of settings are not in it."""
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "spin_ray recipe"}
    return SpinConfig.model_json_schema() | about


def schema_text() -> str:
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False)


def editor_line(schema: str) -> str:
    """Returns the comment that tells editors the schema, a path from the recipe's folder or a URL."""
    return f"# yaml-language-server: $schema={schema}"
