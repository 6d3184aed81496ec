"""An iterate to pass on, and the card that goes with it."""

import base64
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.errors import ConfigError, RunDirError
from spin_ray.inputs.model_folder import folder_entries, open_model
from spin_ray.loop.algorithms.table import ALGORITHMS
from spin_ray.report.export import export
from spin_ray.report.methods import METHODS
from spin_ray.report.model_card import model_card, write_card
from spin_ray.report.preference_rows import write_rows
from spin_ray.run_dir.artefact import Manifest
from spin_ray.run_dir.storage import MANIFEST, folder_digest
from tests.support.made_up_run import TINY, made_up_run

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path):
    """Two iterations; iter_001 has a model."""
    secret = {"engine": {"extra": {"proxy_password": "SECRETSECRET"}}}
    run = made_up_run(tmp_path / "run", model={"path": "someone/base@v1"}, generation=secret)
    folder = run.storage.path(run.model(2).path)
    shutil.copytree(TINY, folder)
    (folder / MANIFEST).write_bytes(Manifest.of(folder_entries(folder), {}, {}).to_bytes())
    return run


def with_config(run, **sections):
    """Changes settings in run.json."""
    description = run.description()
    for name, value in sections.items():
        given = description["config"][name]
        description["config"][name] = given | value if isinstance(given, dict) else value
    run.storage.replace("run.json", json.dumps(description).encode())


@pytest.mark.parametrize("iterate", ["1", "iter_001", "iter-1", "latest"])
def test_an_exported_iterate_is_a_model_folder_with_a_card(run, tmp_path, iterate):
    folder = Path(export(run, iterate, str(tmp_path / "out")))
    by_path = Path(export(str(run.storage.root), iterate, tmp_path / "by path"))
    assert open_model(folder, "exported").digest == open_model(by_path, "exported").digest
    assert (folder / "README.md").read_text() == model_card(run, 2)
    assert not (folder / MANIFEST).exists()


def test_transformers_loads_an_export_and_generates_what_the_iterates_own_folder_does(run, tmp_path):
    """Greedy tokens of the exported folder and of the run's, each loaded by the Auto classes, as TRL and vLLM do."""
    folder = export(run, "1", str(tmp_path / "out"))
    said = []
    for place in (folder, run.storage.path(run.model(2).path)):
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(place)
        chat = [{"role": "user", "content": "2 + 2?"}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said.append(model.generate(**asked, max_new_tokens=8, do_sample=False)[0].tolist())
    assert said[0] == said[1]
    assert len(said[0]) > asked["input_ids"].shape[1]


def test_the_card_says_how_vllm_reads_the_folder_as_transformers_does(run, tmp_path):
    folder = run.storage.path(run.model(2).path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 64}))
    (folder / MANIFEST).write_bytes(Manifest.of(folder_entries(folder), {}, {}).to_bytes())
    card = Path(export(run, "1", str(tmp_path / "out")), "README.md").read_text()
    assert """vllm serve FOLDER --hf-overrides '{"sliding_window": null}'""" in card


def test_the_card_names_base_data_and_results_in_the_hubs_form(run):
    text = model_card(run, 2)
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "someone/base"
    metrics = {it["type"]: it["value"] for it in metadata["model-index"][0]["results"][0]["metrics"]}
    assert metrics["answer_accuracy"] == 0.45
    assert "by 2 iteration(s) of SPIN" in text
    assert "| answer accuracy | 0.450 (0.439 to 0.518) |" in text
    assert "SECRET" not in text


def test_the_card_says_how_many_rows_and_samples_are_graded(run):
    evaluation = json.loads(run.storage.read(run.eval_path(2)))
    rows = evaluation["rows"]
    for graded, said in (
        ({"answers_graded": rows}, ""),
        ({"answers_graded": 2}, " (answers: 2 samples of 2 rows are graded)"),
        ({"answers_graded": 2, "samples_graded": 8}, " (answers: 8 samples of 2 rows are graded)"),
    ):
        run.storage.replace(run.eval_path(2), json.dumps(evaluation | graded).encode())
        assert f"{rows} held-out rows, one fresh sample each{said}; ±" in model_card(run, 2)


def start_of(run, folder, **files):
    """Gives the run another start model, with ``files`` besides those of the tiny Llama."""
    shutil.copytree(TINY, folder)
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        before = json.loads(file.read_text()) if file.suffix == ".json" and file.is_file() else {}
        file.write_text(json.dumps(before | content) if isinstance(content, dict) else content)
    description = run.description() | {"start_model": str(folder)}
    run.storage.replace("run.json", json.dumps(description).encode())


FRONT = (
    "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: [de, fr]\ntags: [x]\n---\n# Start\n"
)


@pytest.mark.parametrize(
    ("card", "expected"),
    [(FRONT, {"license": "other", "license_name": "llama3", "license_link": "LICENSE", "language": ["de", "fr"]}),
     ("---\nlicense: mit\n---", {"license": "mit"}), ("# No front", {}), ("---\n{broken\n---", {})],
)  # fmt: skip
def test_the_card_has_the_licence_and_languages_of_the_start(run, tmp_path, card, expected):
    start_of(run, tmp_path / "start", README__md=card)
    metadata = yaml.safe_load(model_card(run, 2).split("---")[1])
    found = {
        name: metadata[name] for name in ("license", "license_name", "license_link", "language") if name in metadata
    }
    assert found == expected


def test_the_card_says_what_programs_that_load_the_model_would_get_wrong(run, tmp_path):
    assert "## Loading" not in model_card(run, 2)
    start_of(run, tmp_path / "start", generation_config__json={"eos_token_id": [0]},
             config__json={"attn_logit_softcapping": 50.0})  # fmt: skip
    file = run.storage.path(run.model(2).path) / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [0, 2]}))
    with_config(run, model={"chat_template_kwargs": {"mode": "brief"}})
    text = model_card(run, 2)
    assert "Responses end at token 2 (`<|im_end|>`), at which the start model did not stop; `eos_token_id` in " in text
    assert "tokenizer.apply_chat_template(messages, add_generation_prompt=True, mode='brief')" in text
    assert """vllm serve FOLDER --default-chat-template-kwargs '{"mode": "brief"}'""" in text
    assert 'attn_implementation="eager"' in text


def test_the_card_of_an_adapter_says_where_its_base_is_until_it_is_merged(run):
    shutil.move(run.storage.path(run.model(2).path), run.storage.path(run.adapter(2).path))
    assert run.is_adapter(2) and "adapter on `sft/model`" not in model_card(run, 2)
    with_config(run, sft={"epochs": 2})
    assert "adapter on `sft/model`" in model_card(run, 2)
    assert "adapter on `sft/model`" not in model_card(run, 2, merged=True)


def test_the_card_names_no_folder_of_this_machine(run):
    """The hub publishes it."""
    files = [{"path": "/home/me/secret/a.jsonl"}, {"path": "hf://datasets/someone/chat@v1/b.jsonl"}]
    with_config(run, model={"path": "/home/me/secret/base"}, data={"train": files, "heldout": "~/secret/h.jsonl"})
    text = model_card(run, 2)
    assert "secret" not in text
    assert "Made from `base`" in text and "on `a.jsonl, hf://datasets/someone/chat@v1/b.jsonl`" in text
    results = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    assert results[0]["dataset"]["name"] == "h.jsonl"
    with_config(run, model={"path": "someone/base", "chat_template_kwargs": {"suffix": "/a/b"}})
    assert "suffix: /a/b" in model_card(run, 2)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "my_pkg.mine:Mirrored"])
def test_the_card_says_which_algorithm_made_the_model(run, algorithm):
    """Only SPIN is called SPIN, and θ_0 came from the warm-up alone."""
    assert METHODS.keys() == ALGORITHMS.keys()
    with_config(run, algorithm=algorithm, sft={"epochs": 2})
    text = model_card(run, 2)
    made_by = METHODS[algorithm].name if algorithm in METHODS else f"the algorithm `{algorithm}`"
    assert f"by 2 epoch(s) of supervised fine-tuning and 2 iteration(s) of {made_by} on `d.jsonl`" in text
    assert ("to tell the human responses" in text) == (algorithm == "spin")
    assert ("spin" in yaml.safe_load(text.split("---")[1])["tags"]) == (algorithm == "spin")
    assert "by 2 epoch(s) of supervised fine-tuning on `d.jsonl` with spin_ray. Nothing else" in model_card(run, 0)


@pytest.mark.parametrize("path", ["/models/sft", "./base", "someone/local", "embedded:tiny-llama", "~/models/sft"])
def test_a_folder_is_no_base_model_of_the_hub(run, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("someone/local").mkdir(parents=True)
    with_config(run, model={"path": path})
    text = model_card(run, 2)
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert f"Made from `{ {'/models/sft': 'sft', '~/models/sft': 'sft'}.get(path, path) }`" in text


def test_the_hubs_own_reader_understands_the_card(run):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    data = huggingface_hub.ModelCard(model_card(run, 2)).data
    assert data.library_name == "transformers"
    assert {result.metric_type for result in data.eval_results} >= {"answer_accuracy", "against_opponent.loss"}


def test_benchmarks_and_a_data_set_of_the_hub_are_in_the_card(run):
    """lm-eval's numbers as they are in eval.json; ± is 1.96 · 0.01."""
    files = [{"path": f"hf://datasets/someone/chat@v1/{name}.parquet"} for name in "ab"]
    with_config(run, data={"train": files})
    metrics = {"acc_norm": {"value": 0.3125, "standard_error": 0.01}}
    evaluation = json.loads(run.storage.read(run.eval_path(2)))
    conditions = {"backend": "hf", "dtype": "float32", "max_length": None, "chat": False, "limit": None}
    arc = conditions | {"metrics": metrics, "shots": 25, "task_version": 1.0, "warnings": []}
    cut = [{"text": "Truncating N tokens from the left.", "count": 12, "tasks": ["arc_challenge", "mine"]}]
    gsm8k = arc | {"backend": "vllm", "limit": 100}
    evaluation["benchmarks"] = {
        "arc_challenge": arc | {"warnings": cut},
        "mine": arc | {"warnings": cut},
        "gsm8k": gsm8k,
    }
    evaluation["benchmarks"]["empty"] = arc | {"metrics": {"acc": {"value": math.nan, "standard_error": None}}}
    run.storage.replace(run.eval_path(2), json.dumps(evaluation).encode())
    text = model_card(run, 2)
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["datasets"] == ["someone/chat"]
    assert metadata["model-index"][0]["results"][1]["metrics"] == [
        {"type": "acc_norm", "name": "acc_norm", "value": 0.3125}
    ]
    assert "| arc_challenge, hf, float32 | 25 | acc_norm | 0.3125 ± 0.0196 |" in text
    assert "| gsm8k, vllm, float32, first 100 rows | 25 |" in text
    said = "- arc_challenge, mine: lm-eval warned 12 times: Truncating N tokens from the left.\n"
    assert text.count(said) == text.count("lm-eval warned") == 1
    assert len(metadata["model-index"][0]["results"]) == 3, "neither a trial nor NaN is a result for the hub"


def test_the_card_beside_the_weights_is_no_part_of_the_model(run):
    """Neither the folder's digest nor its manifest changes; θ_0 without a warm-up is not the run's to write to."""
    folder = run.storage.path(run.model(2).path)
    before = folder_digest(folder_entries(folder))
    write_card(run, 2)
    assert (folder / "README.md").read_text() == model_card(run, 2)
    assert folder_digest(folder_entries(folder)) == before == folder_digest(run.model(2).verify().files)
    write_card(run, 0)
    assert not run.storage.exists("sft/model")


def test_a_damaged_model_is_not_exported(run, tmp_path):
    with (run.storage.path(run.model(2).path) / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(RunDirError, match="differs from its digest"):
        export(run, "1", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("iterate", ["0", "3", "iter_007", "best", "-1"])
def test_an_iterate_that_is_not_there_is_an_error_that_names_those_that_are(run, tmp_path, iterate):
    with pytest.raises(RunDirError, match=f"has no iterate {iterate}; it has iter_001"):
        export(run, iterate, str(tmp_path / "out"))


def test_nothing_is_written_over(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        export(run, "1", str(tmp_path / "out"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("place", ["/proc/nope/x", "file/x", "file"])
def test_a_place_that_cannot_be_written_is_one_line(call, run, tmp_path, place):
    (tmp_path / "file").touch()
    target = str(tmp_path / place)
    for command in (["export", "--iterate", "1", "--to"], ["report", "--out"]):
        place_of_it = "/proc/nope" if command[0] == "report" and place == "file" else target
        code, _, error = call(command[0], run.storage.root, *command[1:], place_of_it)
        assert code == 2 and error.count("\n") == 1
        assert error.startswith(f"error: {place_of_it}: cannot be written (")


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    """A part of a model would stand in the way of the next one."""
    copy = shutil.copyfile

    def fill(source, target):
        copy(source, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fill)
    with pytest.raises(ConfigError, match="No space left"):
        export(run, "1", str(tmp_path / "out"))
    monkeypatch.setattr(shutil, "copyfile", copy)
    assert not any((tmp_path / "out").iterdir())
    export(run, "1", str(tmp_path / "out"))


def test_rows_for_a_place_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    for place in ("/proc/nope/x.jsonl", str(tmp_path / "file/x.jsonl")):
        with pytest.raises(ConfigError, match=rf"^{place}: cannot be written \("):
            write_rows([], "trl", place, Counter())


def test_the_command_says_where_it_is(call, run, tmp_path):
    code, out, _ = call("export", run.storage.root, "--iterate", "1", "--to", tmp_path / "out")
    assert (code, out.strip()) == (0, str(tmp_path / "out"))


class Hub(BaseHTTPRequestHandler):
    """As much of a Hugging Face hub as an upload asks for; keeps what was committed."""

    created: dict = {}  # noqa: RUF012
    files: dict = {}  # noqa: RUF012
    cards: list = []  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.created.update(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/me/mine", "id": "me/mine"})
        elif self.path == "/api/models/me/mine/preupload/main":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]
            self.answer({"files": modes})
        elif self.path == "/api/models/me/mine/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"http://{self.headers['Host']}/me/mine"})
        else:
            assert self.path == "/api/validate-yaml"
            self.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": []})

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_an_export_to_a_hub_makes_a_private_repository_with_model_and_card(run):
    """The hub's own client in a process of its own, against a server here."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_nobody"}
    command = [sys.executable, "-m", "spin_ray", "export", str(run.storage.root), "--iterate", "1"]
    done = subprocess.run(
        [*command, "--to", "hub:me/mine"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "hub:me/mine"
    assert {"name": "mine", "organization": "me", "visibility": "private"}.items() <= Hub.created.items()
    folder = run.storage.path(run.model(2).path)
    assert next(iter(Hub.files)) == "README.md", "a card that the hub refuses must not cost an upload of weights"
    assert Hub.files.pop("README.md").decode() == model_card(run, 2) == Hub.cards[0]
    assert Hub.files == {name: (folder / name).read_bytes() for name in run.model(2).manifest().files}
