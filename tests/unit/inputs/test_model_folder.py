"""Model folders: what may be trusted is decided before any library opens them."""

import json
import os
import pickle
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from obstore.store import MemoryStore
from safetensors.torch import save_file

from spin_ray.config.sections import ModelConfig
from spin_ray.errors import ConfigError, ModelError, RunDirError
from spin_ray.inputs.merged_start import find_model
from spin_ray.inputs.model_folder import (
    ModelFolder,
    find_folder,
    folder_entries,
    open_artefact,
    open_model,
    read_config,
    refuse_no_model,
    refuse_untrainable,
    unopened_files,
)
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.learner.weights import refuse_damaged
from spin_ray.run_dir import object_storage
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.object_storage import ObjectStorage
from spin_ray.run_dir.storage import MANIFEST, Storage, folder_digest


@pytest.fixture
def folder(tmp_path):
    """What a model folder needs to be one."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512, "pad_token_id": 3}))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


# What is refused


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "sub/vocab.PKL", "weights.pth", "a.ckpt", "a.joblib", "a.pickle"]
)
def test_pickles_are_refused_unread(folder, tmp_path, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(ModelError, match=f"{name}: pickled weights and code can run anything when loaded"):
        open_model(folder, "sft")
    assert not (tmp_path / "canary").exists()
    pickle.loads(path.read_bytes())  # noqa: S301 (our own, to see it run)
    assert (tmp_path / "canary").exists()  # or it would have sung for nobody


@pytest.mark.parametrize("name", ["modeling_canary.py", "sub/helper.py"])
def test_code_is_refused_unrun(folder, tmp_path, name):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.raises(ModelError, match=f"{name}: pickled weights and code"):
        open_model(folder, "sft")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", '{"auto_map": {"AutoConfig": "modeling_canary.CanaryConfig"}}'),
        ("config.json", '{"auto_map": {"AutoConfig": "other/repo--modeling.C"}}'),
        ("config.json", '{"a\\u0075to_map": {"AutoConfig": "m.C"}}'),
        ("config.json", '{"text_config": {"auto_map": {"AutoModel": "m.M"}}}'),
        ("config.json", '{"experts": [{"auto_map": {}}]}'),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["m.T", null]}}'),
        ("preprocessor_config.json", '{"auto_map": {"AutoProcessor": "m.P"}}'),
    ],
)
def test_a_config_that_asks_for_the_models_own_code_is_refused(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match=f"{file}: auto_map asks for the model's own code"):
        open_model(folder, "sft")


def test_the_words_auto_map_in_a_value_are_no_request_for_code(folder):
    (folder / "tokenizer_config.json").write_text('{"chat_template": "say \\"auto_map\\": 1"}')
    open_model(folder, "sft")


def test_code_is_accepted_from_whom_the_config_trusts(folder):
    (folder / "modeling_own.py").write_text("")
    (folder / "config.json").write_text('{"auto_map": {"AutoConfig": "modeling_own.C"}}')
    assert open_model(folder, "sft", trust_remote_code=True).name == "sft"


# What is no model


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="none: no such model folder"):
        open_model(tmp_path / "none", "sft")


def test_a_folder_without_config_or_weights_is_no_model(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no \.safetensors weights; convert them"):
        open_model(folder, "sft")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json; expected a model in Hugging Face layout"):
        open_model(folder, "sft")


@pytest.mark.parametrize("content", ["{", "", "[1]", "7", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json: is not"):
        read_config(folder)
    with pytest.raises(ModelError, match=r"config\.json: is not"):
        open_model(folder, "sft", trust_remote_code=True)


# What is known of a model


@pytest.mark.parametrize(("pad", "pad_id"), [(3, 3), (0, 0), (None, 0), (-1, 0), ("<pad>", 0), ([3], 0)])
def test_the_pad_id_is_the_models_or_any_legal_token(folder, pad, pad_id):
    (folder / "config.json").write_text(json.dumps({"pad_token_id": pad}))
    assert open_model(folder, "sft").pad_id == pad_id


def test_the_digest_follows_every_file_but_the_manifest(folder):
    before = open_model(folder, "sft").digest
    (folder / MANIFEST).write_text("{}")
    assert open_model(folder, "sft").digest == before
    for name in ("model.safetensors", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text('{"changed": true}')
        now = open_model(folder, "sft").digest
        assert now != before
        before = now


def test_the_digest_does_not_depend_on_where_the_model_is(folder, tmp_path):
    before = open_model(folder, "sft").digest
    folder.rename(tmp_path / "moved")
    assert open_model(tmp_path / "moved", "iter_000").digest == before


def test_entries_name_files_below_the_folder(folder):
    (folder / "sub").mkdir()
    (folder / "sub/file.json").write_text("{}")
    entries = folder_entries(folder)
    assert sorted(entries) == ["config.json", "model.safetensors", "sub/file.json", "tokenizer_config.json"]
    assert entries["model.safetensors"].bytes == len(b"weights")


# Where it is


def test_a_model_is_found_from_the_working_directory_and_its_path_is_absolute(folder, monkeypatch):
    """Ray workers run in other folders."""
    monkeypatch.chdir(folder.parent)
    assert find_model(ModelConfig(path="model", max_length=512)) == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model(ModelConfig(path="~/model", max_length=512)) == folder


def test_more_positions_than_the_model_has_are_an_error_with_both_numbers(folder):
    with pytest.raises(
        ConfigError, match=r"model\.max_length: 513 is more than the 512 positions of .*model; lower it"
    ):
        find_model(ModelConfig(path=str(folder), max_length=513))


def test_a_model_that_does_not_say_how_many_positions_it_has_is_accepted(folder):
    (folder / "config.json").write_text("{}")
    assert find_model(ModelConfig(path=str(folder), max_length=10**6)) == folder


@pytest.mark.parametrize("path", ["none", "./a/b", "/none/model", "~/none", "a/b/c"])
def test_a_path_that_cannot_be_a_name_on_the_hub_is_looked_for_on_disk_only(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "spin_ray.inputs.model_folder.fetch_model", lambda name: pytest.fail(f"asked the hub for {name}")
    )
    with pytest.raises(ModelError, match=f"model.path {path}: no such folder"):
        find_model(ModelConfig(path=path))


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host\nlong explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError) as caught:
        find_model(ModelConfig(path="org/name"))
    assert str(caught.value) == ("model.path org/name: no such folder, and the hub did not give it (no route to host)")


def test_nothing_but_safetensors_and_text_is_fetched_from_the_hub(folder, monkeypatch):
    import huggingface_hub

    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or str(folder)
    )
    assert find_model(ModelConfig(path="org/name", max_length=512)) == folder
    assert asked["name"] == "org/name"
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith((".py", ".bin", "*"))]
    fetched = {name for name in ("README.md", "LICENSE", "LICENCE-2.md", "NOTICE", "USE_POLICY.md", "LICENSE.bin")
               if any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])}  # fmt: skip
    assert fetched == {"README.md", "LICENSE", "LICENCE-2.md", "NOTICE", "USE_POLICY.md"}


def test_a_file_in_place_of_a_model_is_named(tmp_path):
    (tmp_path / "model").write_text("weights?")
    with pytest.raises(ModelError, match=r"model: has no config\.json"):
        find_model(ModelConfig(path=str(tmp_path / "model")))


# What trainers leave


def safetensors(path: Path, *names: str) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def test_what_a_trainer_leaves_beside_a_model_is_not_opened_and_not_of_the_model(folder):
    before = open_model(folder, "sft").digest
    left = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json",
            "zero_to_fp32.py", "checkpoint-10/optimizer.pt", "checkpoint-10/a.safetensors",
            "global_step9/a.pt"]  # fmt: skip
    for name in left:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    model = open_model(folder, "sft")
    assert model.digest == before
    assert not model.files.keys() & set(left)
    assert sorted(str(path.relative_to(folder)) for path in unopened_files(folder)) == sorted(left)


def test_a_folder_of_checkpoints_alone_says_which_there_are(folder):
    for number in (500, 1000):
        (folder / f"checkpoint-{number}").mkdir()
        (folder / f"checkpoint-{number}" / "config.json").write_text("{}")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"checkpoint-500, checkpoint-1000\); set model\.path to one, e\.g\. .*-1000$"):
        find_model(ModelConfig(path=str(folder)))


def test_an_adapter_is_told_from_a_model(folder):
    safetensors(folder / "model.safetensors", "model.q_proj.lora_A.weight")
    with pytest.raises(ModelError, match="is an adapter, not a model; merge it"):
        refuse_untrainable(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="is an adapter of org/base, not a model; merge it"):
        refuse_no_model(folder)


@pytest.mark.parametrize(
    ("file", "content", "kind"),
    [
        *[("config.json", {"quantization_config": {"quant_method": kind}}, kind)
          for kind in ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors")],
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4"),
        ("config.json", {"compression_config": {"quant_method": "fp8"}}, "fp8"),
        ("config.json", {"quantization": {"bits": 4}}, "kind unknown"),
        ("quantize_config.json", {"bits": 4}, "gptq"),
        ("hf_quant_config.json", {"quantization": {}}, "modelopt"),
        ("model.safetensors", None, "tensor model.q_proj.qweight"),
    ],
)  # fmt: skip
def test_quantised_weights_are_refused_with_the_cure(folder, file, content, kind):
    refuse_untrainable(folder)
    if content is None:
        safetensors(folder / file, "model.q_proj.qweight")
    else:
        (folder / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"weights are quantised \({kind}\) and cannot be trained; take the model"):
        refuse_untrainable(folder)


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_seq_len"])
@pytest.mark.parametrize("nested", [False, True])
def test_positions_are_known_by_every_name(folder, name, nested):
    config = {name: 256}
    (folder / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    with pytest.raises(ConfigError, match="more than the 256 positions"):
        find_model(ModelConfig(path=str(folder), max_length=257))


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors, which model\.safetensors\.index"):
        open_model(folder, "sft")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a"]}', '{"weight_map": null}'])
def test_an_index_without_a_map_of_weights_is_named(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json: has no weight_map; copy it again"):
        open_model(folder, "sft")


def test_a_folder_that_transformers_could_not_open_is_refused_before_anything_runs(folder):
    weights = folder / "model.safetensors"
    save_file({"a.weight": torch.zeros(4, 4, dtype=torch.float8_e4m3fn)}, weights)
    refuse_damaged(folder)
    with pytest.raises(ModelError, match=r"quantised \(tensor a\.weight is F8_E4M3\)"):
        refuse_untrainable(folder)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors: is damaged or cut off"):
        refuse_damaged(folder)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match="is a pointer of Git LFS and not the file"):
        refuse_damaged(folder)
    weights.unlink()
    save_file({"a": torch.zeros(1)}, folder / "model-00001-of-00001.safetensors")
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        refuse_damaged(folder)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer\.json\); copy it"):
        load_tokenizer(str(folder))


def test_a_revision_of_the_hub_is_fetched(folder, monkeypatch):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.update(options, name=name) or str(folder)
    )
    assert find_model(ModelConfig(path="org/name@v1.2", max_length=512)) == folder
    assert (asked["name"], asked["revision"]) == ("org/name", "v1.2")


# What a run has trained


def trained(storage: Storage, folder: Path) -> Artefact:
    """Commits the files of ``folder`` as a model of a run."""
    for file in folder.iterdir():
        storage.create(f"iter_000/model/{file.name}", file.read_bytes())
    artefact = Artefact(storage, "iter_000/model")
    artefact.commit(folder_entries(folder), {}, {})
    return artefact


@pytest.fixture
def on_store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artefact:
    monkeypatch.setattr(object_storage, "CACHE", tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    storage = ObjectStorage("s3://bucket/run")
    storage.__dict__["_store"] = MemoryStore()  # in the place of the one that _store opens
    return trained(storage, folder)


def test_a_trained_model_on_a_store_is_downloaded_once(folder, on_store, monkeypatch):
    initial, get, read = ModelFolder(folder, "0", "sft", 3), obstore.get, []
    monkeypatch.setattr(obstore, "get", lambda *given, **options: read.append(given[1]) or get(*given, **options))
    opened = open_artefact(on_store, "iter_000", initial)
    assert sorted(name for name in read if not name.endswith(MANIFEST)) == [
        f"iter_000/model/{file.name}" for file in sorted(folder.iterdir())
    ]
    assert opened.digest == folder_digest(on_store.manifest().files)
    read.clear()
    assert open_artefact(on_store, "iter_000", initial) == opened and {Path(name).name for name in read} == {MANIFEST}


@pytest.mark.parametrize(("place", "is_missing"), [("store", True), ("store", False), ("disk", True), ("disk", False)])
def test_a_trained_model_that_is_damaged_is_refused(folder, on_store, tmp_path, place, is_missing):
    artefact = on_store if place == "store" else trained(Storage(tmp_path / "run"), folder)
    weights = "iter_000/model/model.safetensors"
    artefact.storage.delete(weights)
    if not is_missing:
        artefact.storage.create(weights, b"WEIGHTS")
    with pytest.raises(RunDirError, match=f"{weights}: (is missing|differs).*; restore it or remove .*/iter_000/model"):
        open_artefact(artefact, "iter_000", ModelFolder(folder, "0", "sft", 3))


def test_a_folder_that_vllm_would_take_for_a_pattern_is_refused(tmp_path):
    """vLLM finds weights by glob, hours later for a run's own models."""
    (tmp_path / "mod[1]").mkdir()
    with pytest.raises(ConfigError, match=r"model.path .*mod\[1\]: vLLM loads no model from a path with \[; rename it"):
        find_folder(str(tmp_path / "mod[1]"))
