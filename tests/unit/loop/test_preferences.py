"""SPPO's preferences, resumed: the same answers to damage and to foreign parts as generation gives."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
import torch

from spin_ray.errors import RunDirError, StageError
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.loop.algorithms.sppo import preferences
from spin_ray.run_dir.artefact import seal
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support.fakes import config_of, write_answers, write_prompts

CONFIG = config_of(algorithm="sppo", scorer={"path": "scorer"}, generation={"samples_per_prompt": 2})
POLICY = ModelFolder(Path("m"), "digest of θ_0", "sft", 0)


class LongerWins:
    """A preference model: the longer response beats the shorter one."""

    cut = 0

    def wins(self, messages: list[dict[str, str]], responses: list[str]) -> torch.Tensor:
        lengths = torch.tensor([float(len(response)) for response in responses])
        return (lengths[:, None] - lengths[None, :]).sign() / 2 + 0.5


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(Storage(tmp_path))
    write_prompts(run.prompts, count=4, part_rows=2)
    answers = [(f"p{number:03d}", sample, [9] * (1 + sample)) for number in range(4) for sample in range(2)]
    write_answers(run.generations(0), answers, 4)
    return run


def prefer(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, digest: str = "digest of the scorer", cut: int = 0
) -> list[str]:
    """Runs the stage without its actors; returns the names of the parts that it made."""
    made: list[str] = []

    def without_ray(job: preferences.PreferenceJob, parts: list[str], config: Any) -> Any:
        messages = {row["prompt_id"]: row["messages"] for table in job.prompts.tables() for row in table.to_pylist()}
        for name in parts:
            answers = job.generations.read_part(name, job.generations.manifest().files[name])
            texts = ["x" * len(ids) for ids in answers["token_ids"].to_pylist()]
            table = preferences.win_table(answers, texts, messages, LongerWins())
            made.append(name)
            entry = job.target.write_part(name, seal(table, job.fingerprint)).model_dump()
            yield {"name": name, "entry": entry, "cut": cut}

    monkeypatch.setattr(preferences, "_compare", without_ray)
    preferences.run(run, CONFIG, 0, ModelFolder(Path("scorer"), digest, "scorer", 0), POLICY)
    return made


def uncommit(run: RunDir) -> None:
    run.storage.delete("iter_000/preferences/_MANIFEST.json")


def test_a_damaged_part_of_the_preferences_is_made_again_and_told(run, monkeypatch, caplog):
    assert prefer(run, monkeypatch) == ["part-00000.parquet", "part-00001.parquet"]
    whole = run.preferences(0).manifest()
    uncommit(run)
    run.storage.replace("iter_000/preferences/part-00001.parquet", b"PAR1")
    assert prefer(run, monkeypatch) == ["part-00001.parquet"]
    assert run.preferences(0).manifest() == whole
    assert "iter_000/preferences/part-00001.parquet: is damaged; it is made again" in caplog.text
    assert run.events()[-1]["parts_damaged"] == 1


def test_preferences_of_another_model_are_refused_and_kept(run, monkeypatch):
    prefer(run, monkeypatch)
    uncommit(run)
    with pytest.raises(RunDirError, match=r"preferences/part-00000\.parquet: was made from other inputs or with other"):
        prefer(run, monkeypatch, digest="digest of another scorer")
    assert run.preferences(0).part_names() == ["part-00000.parquet", "part-00001.parquet"]


def test_responses_that_lost_their_end_are_counted_and_told(run, monkeypatch, caplog):
    """Nothing told that a preference was judged without the end of a response."""
    prefer(run, monkeypatch, cut=3)
    assert run.events()[-1]["responses_cut"] == 6
    assert (
        "iter_000/preferences: 6 of 8 responses did not fit into scorer.max_length (2048) with their prompts and were "
        "judged without the end; in another run, raise it if the preference model allows it"
    ) in caplog.text


def test_whole_responses_are_not_told(run, monkeypatch, caplog):
    prefer(run, monkeypatch)
    assert "responses_cut" not in run.events()[-1] and "max_length" not in caplog.text


def test_a_preference_model_without_memory_is_told_with_its_settings(run, monkeypatch):
    def without_memory(*_: Any, **__: Any) -> Any:
        raise ray.exceptions.RayError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(preferences, "wait_until_free", lambda *_: None)
    monkeypatch.setattr(preferences, "map_by_actors", lambda *_, **__: SimpleNamespace(iter_rows=lambda: []))
    monkeypatch.setattr(preferences, "with_deadline", without_memory)
    with pytest.raises(
        StageError, match=r"2 GiB; memory ran out: lower scorer\.max_length or .*; committed parts are kept"
    ):
        preferences.run(run, CONFIG, 0, ModelFolder(Path("scorer"), "digest", "scorer", 0), POLICY)
