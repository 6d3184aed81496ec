"""A recipe that is corrected before anything was learnt by it: the same folder goes on, as a new one would."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import DataError, OtherRunError
from spin_ray.loop import driver, launch
from spin_ray.loop.stages import pairs
from spin_ray.loop.stages.training import stage as training
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support import small_run
from tests.support.fakes import FakeEngine


class Killed(BaseException):
    pass


def with_values(config: SpinConfig, **sections: dict[str, Any]) -> SpinConfig:
    given = config.model_dump(mode="json")
    return SpinConfig.model_validate(given | {name: (given[name] or {}) | more for name, more in sections.items()})


def stopped_before(monkeypatch: pytest.MonkeyPatch, config: SpinConfig, out: Path, module: Any, name: str) -> None:
    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, name, die)
        with pytest.raises(Killed):
            small_run.run(config, out)


def test_rows_that_were_refused_are_corrected_in_the_recipe(config, tmp_path):
    strict, out = with_values(config, data={"max_quarantine_fraction": 0.05}), tmp_path / "run"
    with pytest.raises(DataError, match=r"more than data\.max_quarantine_fraction 0\.05"):
        small_run.run(strict, out)
    small_run.run(config, out)
    small_run.run(config, tmp_path / "anew")
    assert small_run.committed(out) == small_run.committed(tmp_path / "anew")


@pytest.mark.parametrize(
    ("sections", "rows_stay"),
    [
        ({"generation": {"sampling": {"max_tokens": 6}}, "objective": {"sft_weight": 0.5}}, True),
        ({"data": {"max_rows": 8}}, False),
        ({"data": {"heldout": None}}, False),
    ],
)
def test_rows_stay_if_only_what_comes_later_changes(config, tmp_path, monkeypatch, sections, rows_stay):
    out, other = tmp_path / "run", with_values(config, **sections)
    stopped_before(monkeypatch, config, out, driver, "_spin")
    before = (out / "prompts" / "_MANIFEST.json").stat().st_mtime_ns
    small_run.run(other, out)
    assert ((out / "prompts" / "_MANIFEST.json").stat().st_mtime_ns == before) == rows_stay
    small_run.run(other, tmp_path / "anew")
    assert small_run.committed(out) == small_run.committed(tmp_path / "anew")


def test_after_the_warm_up_what_it_read_is_bound_and_what_comes_later_is_not(config, tmp_path, monkeypatch):
    out, config = tmp_path / "run", with_values(config, sft={"epochs": 1, "global_batch_rows": 6})
    stopped_before(monkeypatch, config, out, driver, "_spin")
    warm = small_run.committed(out / "sft")
    assert warm
    for sections in ({"sft": {"epochs": 2}}, {"train": {"pack_length": 128}}, {"data": {"max_rows": 8}}):
        with pytest.raises(OtherRunError):
            small_run.run(with_values(config, **sections), out)
    later = {"generation": {"sampling": {"temperature": 0.5, "max_tokens": 6}}, "objective": {"loss": "hinge"}}
    other = with_values(config, **later, train={"global_batch_pairs": 3})
    small_run.run(other, out)
    assert small_run.committed(out / "sft").items() >= warm.items()
    small_run.run(other, tmp_path / "anew")
    assert small_run.committed(out) == small_run.committed(tmp_path / "anew")
    with pytest.raises(OtherRunError, match=r"objective\.loss \(was 'hinge', now 'logistic'\)"):
        small_run.run(with_values(other, objective={"loss": "logistic"}), out)


def test_after_the_answers_the_training_on_them_may_still_be_corrected(config, tmp_path, monkeypatch):
    """Hours of answers should not be lost for a batch that is too large, or a training that fails."""
    out = tmp_path / "run"
    stopped_before(monkeypatch, config, out, pairs, "build")
    answers = small_run.committed(out / "iter_000/generations")
    assert answers
    with pytest.raises(OtherRunError, match=r"generation\.sampling\.max_tokens"):
        small_run.run(with_values(config, generation={"sampling": {"max_tokens": 6}}), out)
    other = with_values(config, objective={"sft_weight": 0.5}, train={"global_batch_pairs": 3})
    small_run.run(other, out)
    assert small_run.committed(out / "iter_000/generations") == answers
    small_run.run(other, tmp_path / "anew")
    assert small_run.committed(out) == small_run.committed(tmp_path / "anew")


def test_after_the_pairs_their_objective_may_be_corrected_but_not_what_made_them(config, tmp_path, monkeypatch):
    """Scores are made by the batches of the pairs, so that the first margins are exactly 0."""
    out = tmp_path / "run"
    stopped_before(monkeypatch, config, out, training, "run")
    for sections in ({"train": {"global_batch_pairs": 3}}, {"objective": {"window": 3}}):
        with pytest.raises(OtherRunError):
            small_run.run(with_values(config, **sections), out)
    other = with_values(config, objective={"sft_weight": 0.5})
    small_run.run(other, out)
    small_run.run(other, tmp_path / "anew")
    assert small_run.committed(out) == small_run.committed(tmp_path / "anew")


def test_a_run_goes_on_with_inputs_that_were_moved(config, tmp_path):
    small_run.run(config, tmp_path / "run")
    for name in ("model", "train.jsonl", "heldout.jsonl"):
        source = Path(config.model.path).parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    moved = with_values(
        config,
        model={"path": str(tmp_path / "model")},
        data={"train": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl")},
    )
    small_run.run(moved.model_copy(update={"iterations": 2}), tmp_path / "run")
    run = RunDir(Storage(tmp_path / "run"))
    assert run.latest() == "iter_001" and run.description()["start_model"] == str(tmp_path / "model")


def test_a_probe_binds_nothing_so_that_its_advice_can_be_followed(config, tmp_path):
    out, advised = tmp_path / "run", with_values(config, objective={"loss": "hinge", "sft_weight": 0.5})
    launch.probe_spin(config, out, start_engine=lambda spec: FakeEngine(vocabulary=60))
    small_run.run(advised, out)
    run = RunDir(Storage(out))
    assert run.latest() == "iter_000" and run.config().objective.loss == "hinge"


def test_a_death_while_rows_are_taken_back_leaves_no_half_of_them(config, tmp_path, monkeypatch):
    out, other = tmp_path / "run", with_values(config, data={"max_rows": 8})
    stopped_before(monkeypatch, config, out, driver, "_spin")
    delete = Storage.delete

    def die(self: Storage, name: str) -> None:
        if name == "prompts":
            raise Killed
        delete(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", die)
        with pytest.raises(Killed):
            small_run.run(other, out)
    small_run.run(config, out)
    small_run.run(config, tmp_path / "anew")
    assert small_run.committed(out) == small_run.committed(tmp_path / "anew")
