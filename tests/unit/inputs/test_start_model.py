"""The model that a run started from: read once, compared by digest, and found again on other machines."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from spin_ray.errors import RunDirError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.start_model import open_initial, start_folder
from spin_ray.run_dir import artefact, storage
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.serving.iterates import open_iterate
from tests.support.tiny_runs import add_iterate, make_adapter_run, make_run

TINY = resolve("embedded:tiny-llama")
COMMIT = "0123456789" * 4


def test_the_frozen_model_is_read_once_and_again_only_when_a_file_has_changed(tmp_path, monkeypatch):
    """Each adapter asks for the model below it; 14 GB are not read for each."""
    run = make_run(tmp_path / "run", iterates=0)
    start = shutil.copytree(run.description()["start_model"], tmp_path / "start")
    description = run.description() | {"start_model": str(start)}
    run.storage.replace("run.json", json.dumps(description).encode())
    read = []
    monkeypatch.setattr(artefact, "file_digest", lambda path: read.append(path.name) or storage.file_digest(path))

    first = open_initial(run)
    assert first.digest == description["inputs"]["model"] and "model.safetensors" in read
    read.clear()
    assert open_initial(run) == first and read == []

    weights = start / "model.safetensors"
    sound, times = weights.read_bytes(), (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    os.utime(weights, ns=times)
    with pytest.raises(RunDirError, match="not the model that this run started from"):
        open_initial(run)
    weights.write_bytes(sound)
    assert open_initial(run) == first


def test_a_warmed_up_frozen_model_that_has_changed_is_named(tmp_path):
    run = make_run(tmp_path / "run", iterates=0)
    add_iterate(run, 0)
    assert open_initial(run).source == run.model(0)
    weights = run.storage.path("sft/model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RunDirError, match=r"model.safetensors: is missing or differs from its digest"):
        open_initial(run)
    weights.unlink()
    with pytest.raises(RunDirError, match=r"model.safetensors: is missing or differs from its digest"):
        open_initial(run)


# On a machine that lacks the folder


def from_another_machine(run: RunDir, path: str, folder: str) -> None:
    """Lets the run have started there from ``model.path``, found in ``folder``."""
    description = run.description() | {"start_model": folder}
    description["config"]["model"] |= {"path": path}
    run.storage.replace("run.json", json.dumps(description).encode())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The hub gives the tiny model for any name; the dict has what it was asked for last."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.update(options, name=name) or TINY
    )
    return asked


def test_a_model_of_the_hub_is_fetched_again_in_the_commit_that_the_run_began_with(tmp_path, hub):
    """A driver's pod takes its cache with it; main may have moved since."""
    run = make_run(tmp_path / "run", iterates=0)
    from_another_machine(run, "org/name", f"/gone/models--org--name/snapshots/{COMMIT}")
    found = open_initial(run)
    assert (str(found.path), hub["name"], hub["revision"]) == (TINY, "org/name", COMMIT)
    served = open_iterate(run, "sft")
    assert (served.folder, served.digest) == (Path(TINY), run.description()["inputs"]["model"])
    assert "*.safetensors" in hub["allow_patterns"]
    assert str(start_folder(run, weights=False)) == TINY
    assert "*.safetensors" not in hub["allow_patterns"] and "*.json" in hub["allow_patterns"]


def test_an_adapter_is_served_and_exported_where_its_base_has_another_folder(tmp_path, hub):
    from spin_ray.report.export import export

    run = make_adapter_run(tmp_path / "run", iterates=1)
    from_another_machine(run, "org/name@v1", "/gone/model")
    served = open_iterate(run, "iter-0")
    assert served.base is not None and served.base.folder == Path(TINY) and hub["revision"] == "v1"
    there = pickle.loads(pickle.dumps(served.base))  # noqa: S301 (as Ray does)
    assert there.here().folder == Path(TINY)
    assert (Path(export(run, "latest", tmp_path / "out")) / "model.safetensors").is_file()


@pytest.mark.parametrize("path", ["/gone/model", "org/name"])
def test_a_model_that_is_nowhere_is_named_with_folder_digest_and_cure(tmp_path, path):
    """Tests ask no hub (HF_HUB_OFFLINE)."""
    run = make_run(tmp_path / "run", iterates=0)
    from_another_machine(run, path, "/gone/model")
    digest = run.description()["inputs"]["model"]
    with pytest.raises(
        RunDirError,
        match=rf"started from, {path} \(digest {digest[:16]}…\), whose folder /gone/model is not on this machine; copy "
        rf"it there, or make it available again: model.path {path}: no such folder",
    ):
        open_initial(run)


def test_another_model_under_the_same_name_is_refused(tmp_path, hub, monkeypatch):
    run = make_run(tmp_path / "run", iterates=0)
    other = shutil.copytree(TINY, tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(other))
    from_another_machine(run, "org/name", "/gone/model")
    with pytest.raises(RunDirError, match=r"available again: .*other: is not the model that this run started from"):
        open_initial(run)
