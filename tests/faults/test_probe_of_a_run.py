"""A probe through the real stages, within this process; the engine is a fake."""

import json

import pytest

from spin_ray.config.recipe import SpinConfig
from spin_ray.loop import launch, probe
from spin_ray.report.page import report_page
from spin_ray.report.probe import read_probe
from spin_ray.report.status import status_as_json
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime.engine import Completion
from tests.support import small_run
from tests.support.fakes import FakeEngine


def with_probe(config: SpinConfig, **settings: object) -> SpinConfig:
    given = {"prompts": 12, "global_batch_pairs": 3} | settings
    return SpinConfig.model_validate(config.model_dump() | {"probe": given})


def probed(config: SpinConfig, out, engine: FakeEngine | None = None) -> dict:
    return launch.probe_spin(config, out, start_engine=lambda spec: engine or FakeEngine(vocabulary=60))


def test_a_probe_is_kept_and_a_run_goes_on_from_it(config, tmp_path):
    config, out = with_probe(config), tmp_path / "run"
    found = probed(config, out)
    evidence = found["evidence"]
    assert evidence["rows"] == 6 + small_run.HELDOUT_ROWS and not evidence["heldout_is_train"]
    assert {"loss", "sft_gain", "jsd_lower_bound"} <= evidence["standard_errors"].keys()
    assert evidence["sft_gain"] != 0 and evidence["margin"] != 0
    run = RunDir(Storage(out))
    assert read_probe(run) == found == json.loads((out / "probe.json").read_text())
    assert not list((out / "probe").rglob("*.safetensors"))
    engine = FakeEngine(vocabulary=60)
    assert probed(config, out, engine) == found and engine.calls == []
    small_run.run(config, out)
    assert run.latest() == "iter_000" and read_probe(run) == found
    assert status_as_json(run)["latest"] == "iter_000" and report_page([run])


def test_other_settings_probe_again(config, tmp_path):
    first = probed(with_probe(config, sft=False), tmp_path / "run")
    assert first["evidence"]["sft_gain"] is None
    again = probed(with_probe(config), tmp_path / "run")
    assert again["made_from"] != first["made_from"] and again["evidence"]["sft_gain"] is not None


def test_few_rows_are_probed_without_a_training_and_the_runs_schedule_is_not_the_probes(config, tmp_path):
    found = probed(with_probe(config, global_batch_pairs=8, prompts=8), tmp_path / "few")
    assert found["evidence"]["loss"] is None and found["evidence"]["sft_gain"] is None and found["sentences"]
    longer = config.with_train(schedule_epochs=9)
    assert (
        probed(with_probe(longer), tmp_path / "longer")["evidence"]
        == probed(with_probe(config), tmp_path / "run")["evidence"]
    )


class Parrot(FakeEngine):
    """Answers each sum as its human response does."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self._answers = answers

    def generate(self, prompt_ids, sampling, seeds, *, audited=0):
        self.calls.append([])
        return [Completion(self._answers[tuple(prompt)], "stop") for prompt in prompt_ids]


def test_a_saturated_model_is_told_to_stop_and_does_where_the_recipe_says_so(config, tmp_path):
    out, run = tmp_path / "run", RunDir(Storage(tmp_path / "run"))
    probed(with_probe(config, sft=False), tmp_path / "other")
    other = RunDir(Storage(tmp_path / "other"))
    tables = [*other.prompts.tables(), *other.heldout.tables()]
    parrot = Parrot({tuple(row["prompt_ids"]): row["real_ids"] for table in tables for row in table.to_pylist()})
    config = with_probe(config, sft=False, stop=True)
    result = launch.run_spin(config, out, start_engine=lambda spec: parrot)
    found = read_probe(run)
    assert (found["verdict"], found["rule"], found["evidence"]["jsd_lower_bound"]) == ("stop", "saturated", None)
    assert (run.latest(), result.evaluations) == (None, [])
    assert launch.is_finished(run, config)
    asked = len(parrot.calls)
    launch.run_spin(config, out, start_engine=lambda spec: parrot)
    assert len(parrot.calls) == asked, "the same recipe has its verdict"
    corrected = config.model_copy(update={"data": config.data.model_copy(update={"max_rows": 10})})
    launch.run_spin(corrected, out, start_engine=lambda spec: parrot)
    assert read_probe(run)["made_from"] != found["made_from"], "other rows are probed again"
    hotter = corrected.model_copy(update={"objective": corrected.objective.model_copy(update={"beta": 2.0})})
    launch.run_spin(hotter, out, start_engine=lambda spec: parrot)
    assert len({found["made_from"], read_probe(run)["made_from"]}) == 2
    small_run.run(with_probe(config, sft=False, stop=False), out)
    assert run.latest() == "iter_000"


def test_without_held_out_rows_it_measures_on_other_training_rows(config, tmp_path):
    config = with_probe(config, sft=False)
    config = config.model_copy(update={"data": config.data.model_copy(update={"heldout": None})})
    found = probed(config, tmp_path / "run")
    assert found["evidence"]["heldout_is_train"] and found["evidence"]["rows"] == 12
    assert any("data.heldout" in caution for caution in found["cautions"])


def test_a_probe_goes_on_after_a_death(config, tmp_path, monkeypatch):
    config = with_probe(config)
    with monkeypatch.context() as patch:
        patch.setattr(probe, "_scores", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            probed(config, tmp_path / "run")
    engine = FakeEngine(vocabulary=60)
    found = probed(config, tmp_path / "run", engine)
    assert engine.calls == []
    assert found["evidence"] == probed(config, tmp_path / "other")["evidence"]
