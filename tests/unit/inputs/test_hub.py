"""Models and data of the hub, asked by its own client of a server on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfFileSystem, constants

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ModelConfig
from spin_ray.errors import DataError, ModelError, UserError
from spin_ray.inputs import hub as hub_module
from spin_ray.inputs.check import _open_scorer, check_recipe
from spin_ray.inputs.hub import unlisted, unpinned
from spin_ray.inputs.merged_start import _base_of, find_model
from spin_ray.inputs.model_folder import find_folder, folder_here
from spin_ray.inputs.sources import estimate_rows, files_digest, find_files, read_slice, split
from tests.support.hub import Hub, hub_here

ROWS = [{"prompt": f"q{number}", "response": "a"} for number in range(9)]
TRAIN = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
MODEL = {
    "config.json": b"{}", "model.safetensors": b"weights", "chat_template.jinja": b"x", "spiece.model": b"x",
}  # fmt: skip
DATA = "hf://datasets/o/rows"


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets what the client takes from HF_ENDPOINT while it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}{template[2]}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_here() as hub:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        point_at(hub.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        HfFileSystem.clear_instance_cache()  # an instance keeps the hub that it was made for
        yield hub
        HfFileSystem.clear_instance_cache()


def rows_of(source: str) -> list[object]:
    return [row.content for piece in split(find_files(source)) for row in read_slice(piece)]


def test_a_model_is_fetched_once_without_what_nothing_opens_and_found_offline(hub, monkeypatch):
    left = {"consolidated.safetensors": b"x", "checkpoint-5/model.safetensors": b"x", "pytorch_model.bin": b"x"}
    old = hub.add("models/o/tiny", MODEL)
    commit = hub.add("models/o/tiny", MODEL | left | {"config.json": b"{ }"})
    folder = find_model(ModelConfig(path="o/tiny"))
    assert folder.name == commit, "run.json keeps the path, and with it the commit"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(MODEL)
    assert find_folder("o/tiny", revision=old).name == old
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert find_folder("o/tiny") == folder and find_folder(f"o/tiny@{old}").name == old
    assert len(hub.asked) == asked


def test_what_was_downloaded_is_on_this_machine_for_commands_that_ask_no_hub(hub):
    """init and plan read it; a config alone, as AutoConfig leaves it, is no model of which rows could be measured."""
    old = hub.add("models/o/tiny", MODEL)
    find_folder("o/tiny")
    assert folder_here("o/tiny") is None, "it has no tokenizer"
    commit = hub.add("models/o/tiny", MODEL | {"tokenizer.json": b"{}"})
    folder, asked = find_folder("o/tiny"), len(hub.asked)
    assert folder_here("o/tiny") == folder_here(f"o/tiny@{commit}") == folder_here("o/tiny@v9", commit) == folder
    assert folder_here("o/tiny", old) is folder_here("o/other") is folder_here("no..name/of a model") is None
    assert len(hub.asked) == asked
    with pytest.raises(ModelError, match="no such folder"):
        folder_here("./o/tiny")


def test_a_revision_is_of_the_model_that_it_is_said_of(hub, tmp_path):
    """The policy's is not the scorer's. PEFT loads an adapter's base at the revision that the adapter names."""
    old, new = hub.add("models/o/tiny", MODEL), hub.add("models/o/tiny", MODEL | {"config.json": b"{ }"})
    of_scorer = hub.add("models/o/scorer", MODEL)
    recipe = {
        "model": {"path": f"o/tiny@{new}", "revision": old}, "data": {"train": "a.jsonl"}, "algorithm": "sppo",
        "scorer": {"path": "o/scorer"},
    }  # fmt: skip
    config = SpinConfig.model_validate(recipe)
    assert find_model(config.model).name == old
    assert (found := _open_scorer(config)) and found.path.name == of_scorer
    with pytest.raises(ModelError, match=r"scorer\.path o/scorer@v9: .*o/scorer has no revision v9"):
        _open_scorer(SpinConfig.model_validate(recipe | {"scorer": {"path": "o/scorer@v9"}}))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "o/tiny", "revision": old}))
    assert _base_of(adapter, config.model).name == old
    assert _base_of(adapter, ModelConfig(path=str(adapter), base="o/tiny")).name == new


def test_code_is_fetched_only_if_trusted(hub):
    hub.add("models/o/coded", MODEL | {"modeling_own.py": b"x = 1"})
    assert not (find_model(ModelConfig(path="o/coded")) / "modeling_own.py").exists()
    assert (find_model(ModelConfig(path="o/coded", trust_remote_code=True)) / "modeling_own.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["data/train-0.jsonl", "data/*.jsonl", "data", "*/train*"])
def test_data_of_a_commit_is_the_same_online_and_offline(hub, monkeypatch, inside):
    from huggingface_hub import snapshot_download

    commit = hub.add("datasets/o/rows", {"data/train-0.jsonl": TRAIN, "README.md": b"x"})
    hub.add("datasets/o/rows", {"data/train-0.jsonl": b"{}"})
    source = f"{DATA}@{commit}/{inside}"
    files, digest = find_files(source), files_digest(find_files(source))
    assert files == [f"{DATA}@{commit}/data/train-0.jsonl"]
    assert rows_of(source) == ROWS
    snapshot_download("o/rows", repo_type="dataset", revision=commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert (find_files(source), files_digest(files), rows_of(source)) == (files, digest, ROWS)
    assert len(hub.asked) == asked


def test_offline_data_that_may_be_a_part_is_told_with_the_command(hub, monkeypatch):
    from huggingface_hub import hf_hub_download, snapshot_download

    commit = hub.add("datasets/o/rows", {"data/a.jsonl": TRAIN, "data/b.jsonl": TRAIN})
    hf_hub_download("o/rows", "data/a.jsonl", repo_type="dataset", revision=commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert unlisted(f"{DATA}@{commit}/data") == f"hf download o/rows --repo-type dataset --revision {commit}"
    model, sampling = {"path": "embedded:tiny-llama", "max_length": 128}, {"max_tokens": 24}
    recipe = {"model": model, "data": {"train": f"{DATA}@{commit}/data"}, "generation": {"sampling": sampling}}
    found = check_recipe(SpinConfig.model_validate(recipe | {"train": {"global_batch_pairs": 1}})).findings
    assert any("files may be missing in the cache" in finding.sentence for finding in found)
    assert unlisted(f"{DATA}@{commit}/data/*.jsonl") and not unlisted(f"{DATA}@{commit}/data/a.jsonl")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert unlisted(f"{DATA}@{commit}/data") is None
    snapshot_download("o/rows", repo_type="dataset", revision=commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert unlisted(f"{DATA}@{commit}/data") is None


def test_data_that_names_no_commit_is_told_with_the_commit(hub):
    commit = hub.add("datasets/o/rows", {"a.jsonl": TRAIN})
    assert rows_of(f"{DATA}/a.jsonl") == ROWS
    assert unpinned(f"{DATA}/a.jsonl") == f"{DATA}@{commit}/a.jsonl"
    assert unpinned(f"{DATA}@main/a.jsonl") == f"{DATA}@{commit}/a.jsonl"
    assert unpinned(f"{DATA}@{commit}/a.jsonl") is None and unpinned("a.jsonl") is None


def test_a_branch_with_a_slash_is_read(hub):
    hub.add("datasets/o/rows", {"default/train/0000.jsonl": TRAIN}, branch="refs/convert/parquet")
    assert rows_of(f"{DATA}@refs/convert/parquet/default/train/*.jsonl") == ROWS
    assert estimate_rows(find_files(f"{DATA}@refs/convert/parquet/default/train/*.jsonl")) == len(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf://datasets/o/rows@nope/a.jsonl", "o/rows has no revision nope"),
        ("hf://datasets/o/rows/none.jsonl", "no such data"),
        ("hf://datasets/o/none/a.jsonl", "/datasets/o/none does not exist, or HF_TOKEN may not read it"),
        ("hf://o/rows/a.jsonl", "data is hf://datasets/OWNER/NAME/FILE"),
        ("hf://datasets/o/gated/a.jsonl", "is gated: accept its terms at http"),
        ("hf://", "expected hf://datasets/OWNER/NAME@REVISION/FILE"),
        ("hf://datasets/gsm8k/main/train.parquet", "OWNER is needed, too: gsm8k is read as the owner"),
        ("hf://buckets/o/n/a.jsonl", "expected hf://datasets/OWNER/NAME@REVISION/FILE"),
        ("hf://datasets/squad", "expected hf://datasets/OWNER/NAME@REVISION/FILE"),
        ("hf://datasets/o/splits", "name one, e.g. hf://datasets/o/splits/train.jsonl"),
    ],
)
def test_data_that_the_hub_does_not_give_is_one_line_with_the_cure(hub, source, said):
    hub.add("datasets/o/rows", {"a.jsonl": TRAIN})
    hub.add("datasets/o/gated", {"a.jsonl": TRAIN}, gated=True)
    hub.add("datasets/o/splits", {"train.jsonl": TRAIN, "test.jsonl": TRAIN})
    with pytest.raises(DataError) as caught:
        rows_of(source)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_token_opens_what_is_gated(hub, monkeypatch):
    hub.add("models/o/gated", MODEL, gated=True)
    with pytest.raises(ModelError, match=r"the hub did not give it \(o/gated is gated: .* set HF_TOKEN"):
        find_folder("o/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    assert find_folder("o/gated").is_dir()


@pytest.mark.parametrize(
    ("state", "said"),
    [("down", r"does not answer \(status 503"), ("dead", r"does not answer \(.*refused"), ("offline", "OFFLINE is")],
)  # fmt: skip
def test_without_a_hub_there_is_one_line_with_the_command_that_fetches(hub, monkeypatch, state, said):
    hub.down = state == "down"
    point_at("http://127.0.0.1:9" if state == "dead" else hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", state == "offline")
    for look, command in (
        (lambda: find_files(f"{DATA}@v1/a.jsonl"), "hf download o/rows --repo-type dataset --revision v1"),
        (lambda: find_folder("o/tiny@v1"), "hf download o/tiny --revision v1"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            look()
        assert command in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_is_not_there_is_told(hub):
    hub.add("models/o/tiny", MODEL)
    with pytest.raises(ModelError, match=r"o/none does not exist, or HF_TOKEN may not read it"):
        find_folder("o/none")
    with pytest.raises(ModelError, match="o/tiny has no revision v9"):
        find_folder("o/tiny@v9")


def test_a_hub_that_accepts_and_is_silent_is_told_and_what_is_cached_is_taken(hub, monkeypatch):
    """The client itself would wait for ever."""
    monkeypatch.setattr(hub_module, "SILENCE_S", 0.2)
    commit = hub.add("models/o/tiny", MODEL)
    there = find_folder("o/tiny")
    hub.silent_at = "/"
    with pytest.raises(
        ModelError, match=r"does not answer \(timed out\).* HF_ENDPOINT.*hf download o/other \(.*HF_HUB_OF"
    ):
        find_folder("o/other")
    assert find_folder("o/tiny") == find_folder(f"o/tiny@{commit}") == there
    assert unpinned(f"{DATA}/a.jsonl") is None
    hub.silent_at = ""
