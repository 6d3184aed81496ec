"""What `pip install` of a wheel or an sdist brings."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package_with_its_recipes_and_pages_and_no_more(tmp_path: Path) -> None:
    source, dist = tmp_path / "source", tmp_path / "dist"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = listed.stdout.splitlines()
    for name in tracked:
        if name.startswith(("spin_ray/", "jobs/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    for kind in ("wheel", "sdist"):
        build = f"from setuptools import build_meta; build_meta.build_{kind}({str(dist)!r})"
        subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    modules = {name for name in tracked if name.startswith("spin_ray/") and name != "spin_ray/config/recipes"}
    recipes = {f"spin_ray/config/recipes/{path.name}" for path in (ROOT / "jobs" / "recipes").iterdir()}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == modules | recipes
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert modules | recipes <= found


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("cpu.lock", ("cpu", "deepspeed", "lora", "embedded", "eval", "dev")),
        ("gpu.lock", ("gpu", "deepspeed", "lora", "quantised", "embedded", "eval")),
    ],
)
def test_a_lock_has_what_set_up_the_recipes_and_the_tests_of_its_machine_need(
    lock: str, extras: tuple[str, ...]
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements" / lock).read_text(), re.MULTILINE))
    asked = project["dependencies"] + [each for extra in extras for each in project["optional-dependencies"][extra]]
    names = {re.split(r"[\[<>=!~; ]", each)[0].lower().replace("_", "-") for each in asked}
    assert names - locked <= {"torch"}, "torch comes first and apart (requirements/torch.txt)"
    assert {"pytest", "pytest-timeout"} <= locked
