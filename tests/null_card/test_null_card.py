"""The CUDA path runs on the null card, and its kernels compile for the cards that people have."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.null_card.card import CUDA, build, environment
from tests.null_card.programs import SETTINGS
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason=f"torch {torch.__version__} is built without CUDA"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real card; see tests/gpu"),
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="gcc or nm is missing"),
    pytest.mark.skipif(not CUDA.is_dir(), reason=f"{CUDA} is missing"),
]


@pytest.fixture(scope="module")
def libraries() -> Path:
    """Keeps compiled kernels for the next time, in a folder that git ignores."""
    folder = ROOT / "build" / "null_card"
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    return folder


def run(libraries: Path, *arguments: str, capability: int = 90) -> str:
    """Returns the last line that a program prints."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.null_card.programs", *arguments]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment(libraries, capability=capability), capture_output=True, text=True,
        timeout=1800,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.splitlines()[-1] if ended.stdout else ""


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_attention_compiles_for_each_card(libraries: Path, capability: int) -> None:
    """Cards of people's own (8.6, 8.9, 12.0) have 99 KiB of shared memory, those of data centres 163 or 227."""
    run(libraries, "kernels", "64", "128", "192", "256", "512", capability=capability)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_learner_scores_trains_saves_loads_and_exports(libraries: Path, settings: str) -> None:
    run(libraries, "learns", settings)


@pytest.mark.parametrize("settings", ["as it is", "reduced every pack", "adapters"])
def test_a_step_waits_for_the_card_once(libraries: Path, settings: str) -> None:
    assert run(libraries, "waits", settings).startswith("1 {'fsdp2.py:")


@pytest.mark.parametrize("settings", ["as it is", "checkpointing"])
def test_a_closed_backend_leaves_no_memory_behind(libraries: Path, settings: str) -> None:
    assert run(libraries, "frees", settings) == "0 0"


@pytest.mark.parametrize("settings", ["as it is", "checkpointing", "reduced every pack", "adapters"])
def test_the_plan_of_memory_is_near_what_torch_allocates(libraries: Path, settings: str) -> None:
    """The plan may say a third too much, and nothing too little that its margin (``FILLED``) does not hold."""
    assert 0.9 < float(run(libraries, "memory", settings)) < 1.35


def test_a_kernel_whose_gradient_does_not_fit_the_card_is_not_taken(libraries: Path) -> None:
    assert run(libraries, "falls_back", "", capability=86) == "varlen"
