"""Which model families are scored in packs, how far are scores and gradients from transformers', which does vLLM list?

    python benchmarks/models.py [--write] [NAME ...]

Examines tiny random models, as tests/unit/learner/test_models.py does.
"""

import argparse
import logging
import os
import sys
import tempfile
from datetime import date
from pathlib import Path

import transformers

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.append(str(Path(__file__).parents[1]))

from tables import ROOT, put
from where import machine

from tests.support.learner_cases import one_rank
from tests.support.model_kinds import KINDS
from tests.support.model_matrix import Outcome, examine

COLUMNS = ("family", "class", "trait", "scored", "log p", "gradient", "moved", "export", "vLLM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(KINDS), metavar="NAME", help="families; all by default")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    from vllm import ModelRegistry, __version__

    known = set(ModelRegistry.get_supported_archs())
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    with tempfile.TemporaryDirectory() as name, one_rank(Path(name)):
        for family in options.names:
            (folder := Path(name) / family).mkdir()
            lines.append(row(family, *looked_at(family, folder), known))
            print(lines[-1], flush=True)
    versions = f"transformers {transformers.__version__}, vLLM {__version__}, {machine()}, {date.today().isoformat()}"
    if options.write:
        put("models", "\n".join([*lines, "", f"Made on {versions}."]), ROOT / "docs" / "models.md")


def looked_at(family: str, folder: Path) -> tuple[Outcome, str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("spin_ray.learner.layout")
    logger.addHandler(handler)
    try:
        return examine(KINDS[family], folder), said[0] if said else ""
    finally:
        logger.removeHandler(handler)


def row(family: str, outcome: Outcome, warning: str, known: set[str]) -> str:
    kind = KINDS[family]
    name = type(kind.make()).__name__
    cells = [
        family, f"`{name}`", kind.trait, outcome.layout + because(warning), f"{outcome.logps:.0e}",
        f"{outcome.gradients:.0e}", f"{outcome.moved:.0e}",
        f"{outcome.export:.0e}" + ("" if outcome.same_names else ", other names"), "yes" if name in known else "no",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def because(warning: str) -> str:
    """Returns the part of the probe's warning that says why packs are not used."""
    reason = warning.partition("packed (trees): ")[2].partition("; ")[0]
    return f": {reason}" if reason else ""


if __name__ == "__main__":
    main()
