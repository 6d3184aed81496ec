"""A finished run whose recipe changes: what is finished keeps its values, and every record shows them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import RunDirError
from spin_ray.inputs import check
from spin_ray.report.model_card import model_card
from spin_ray.report.page.view import read_view
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support import small_run


def changed(config: SpinConfig, **values: Any) -> SpinConfig:
    """Returns a recipe with other values, e.g. ``train__epochs=3``."""
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        *sections, name = key.split("__")
        section = tree
        for each in sections:
            section = section[each]
        section[name] = value
    return SpinConfig.model_validate(tree)


@pytest.fixture
def finished(tmp_path: Path, calm: Path) -> Path:
    shutil.copytree(calm, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"objective__beta": 5.0},
            r"objective\.beta \(was 0\.1 for iter_000, now 5\.0\); restore them, give later iterations their own "
            r"values \(iterations: 2, objective\.beta: \[0\.1, 5\.0\]\), or choose another --out",
        ),
        ({"train__learning_rate": 9e-4}, r"train\.learning_rate \(was 0\.001 for iter_000, now 0\.0009\)"),
        ({"train__epochs": 3}, r"train\.epochs \(was 2 for iter_000, now 3\).* train\.epochs: \[2, 3\]"),
        ({"train__schedule_epochs": 5}, r"schedule_epochs \(was None for iter_000, now 5\); restore them, or choose"),
        ({"train__optimizer__eps": 1e-3}, r"train\.optimizer\.eps \(was None for iter_000, now 0\.001\); restore"),
        ({"iterations": 2, "objective__beta": 5.0}, r"now 5\.0\).*values \(objective\.beta: \[0\.1, 5\.0\]\), or"),
    ],
)  # fmt: skip
def test_other_values_of_what_is_finished_are_refused_and_written_nowhere(config, finished, values, told):
    before = (finished / "run.json").read_bytes()
    with pytest.raises(RunDirError, match=told):
        small_run.run(changed(config, **values), finished)
    assert (finished / "run.json").read_bytes() == before


def test_a_list_that_keeps_what_is_finished_goes_on(config, finished):
    small_run.run(changed(config, iterations=2, objective__beta=[0.1, 5.0], train__epochs=[2, 1]), finished)
    run = RunDir(Storage(finished))
    assert run.latest() == "iter_001" and run.model(2).manifest().settings["beta"] == 5.0
    with pytest.raises(RunDirError, match=r"objective\.beta \(was 5\.0 for iter_001, now 0\.1\)"):
        small_run.run(changed(config, iterations=2, train__epochs=[2, 1]), finished)


def test_iterations_cannot_end_before_what_is_finished(config, finished):
    raised = changed(config, iterations=2)
    small_run.run(raised, finished)
    with pytest.raises(RunDirError, match=r"iterations \(now 1\) is less than the 2 that are finished; give 2 or more"):
        small_run.run(config, finished)


def test_a_card_names_the_versions_that_made_its_model(config, finished, monkeypatch):
    first, run = check.versions(), RunDir(Storage(finished))
    monkeypatch.setattr(check, "versions", lambda: first | {"torch": "99.1"})
    small_run.run(config, finished)
    assert f"torch {first['torch']}" in model_card(run, 1), "a call that makes nothing is no maker"
    assert [since for since, _ in read_view(run).versions] == [""]
    monkeypatch.setattr(check, "versions", lambda: first | {"torch": "99.2"})
    small_run.run(changed(config, iterations=2), finished)
    assert f"torch {first['torch']}" in model_card(run, 1) and "torch 99.2" in model_card(run, 2)
    assert [since for since, _ in read_view(run).versions] == ["", "iter_001"]
    assert run.description()["versions"] == first
    assert run.description()["versions_since"] == {"iter_001": first | {"torch": "99.2"}}
