"""Places in the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "jobs" / "recipes"
DOCS = ROOT / "docs"
