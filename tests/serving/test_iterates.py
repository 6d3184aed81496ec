"""Which iterates may serve, and what must be true before anything listens."""

import asyncio
import hashlib
import io
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray
from ray import serve
from ray.exceptions import RayTaskError
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.utils import is_in_target_modules

from spin_ray.config.limits import TEMPERATURES
from spin_ray.config.load import override
from spin_ray.errors import ConfigError, DataError, ResourceError, RunDirError, StageError
from spin_ray.run_dir.artefact import folder_entries
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import folder_digest
from spin_ray.serving import server
from spin_ray.serving.app import build, check_devices
from spin_ray.serving.batch import compare_rows, read_rows
from spin_ray.serving.iterate_engine import IterateEngine, _for_adapters, build_engine
from spin_ray.serving.iterates import open_iterate, wanted
from spin_ray.serving.server import check_room, check_settings, start, with_room
from tests.support.fake_engines import FakeEngines
from tests.support.fakes import config_of
from tests.support.paths import ROOT
from tests.support.tiny_runs import add_iterate, make_adapter_run, make_run, tiny_config


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run", iterates=1)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (("sft", "latest"), (["sft", "iter-0"], "iter-0")),
        (("sft",), (["sft"], None)),
        (("all",), (["sft", "iter-0"], "iter-0")),
        (("iter-0", "iter-1"), (["iter-0"], None)),
    ],
)
def test_only_what_was_published_is_wanted(
    run: RunDir, models: tuple[str, ...], expected: tuple[list[str], str | None]
) -> None:
    """θ_2 is committed but not published: the driver has not evaluated it yet."""
    add_iterate(run, 2)
    assert wanted(run, models) == expected


def test_the_digest_is_that_of_the_folder(run: RunDir) -> None:
    for name, folder in (
        ("sft", Path(run.description()["start_model"])),
        ("iter-0", run.storage.path("iter_000/model")),
    ):
        iterate = open_iterate(run, name)
        assert (iterate.folder, iterate.digest) == (folder, folder_digest(folder_entries(folder)))


@pytest.mark.parametrize("made", [make_run, make_adapter_run])
def test_a_checked_iterates_files_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[..., RunDir]
) -> None:
    run, digest, read = made(tmp_path / "run", iterates=1), hashlib.file_digest, []
    folder = run.model(1).local_folder()
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(Path(file.name)) or digest(file, kind))
    open_iterate(run, "iter-0")
    assert sorted(path for path in read if path.parent == folder) == sorted(
        folder / name for name in run.model(1).manifest().files
    )


@pytest.mark.parametrize("damage", ["flip", "remove", "config", "manifest"])
def test_an_iterate_whose_files_are_not_what_was_committed_is_not_opened(run: RunDir, damage: str) -> None:
    file = run.storage.path("iter_000/model/model.safetensors")
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "remove":
        file.unlink()
    elif damage == "config":
        (file.parent / "config.json").write_text("{")
    else:
        (file.parent / "_MANIFEST.json").write_text("{")
    with pytest.raises(RunDirError):
        open_iterate(run, "iter-0")


def test_a_start_model_that_is_not_the_runs_own_is_not_opened(run: RunDir) -> None:
    description = run.description()
    description["inputs"]["model"] = "0" * 64
    run.storage.replace("run.json", json.dumps(description).encode())
    with pytest.raises(RunDirError, match="not the model that this run started from"):
        open_iterate(run, "sft")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"serving.host": "0.0.0.0"}, "set serving.keys first"),
        ({"serving.models": "[gpt-4]"}, "'gpt-4' is none of sft"),
        ({"serving.models": "[iter-5]"}, "has published none of iter-5"),
        ({"serving.keys": "/nowhere"}, "cannot be read"),
    ],
)
def test_what_cannot_serve_is_refused_before_anything_starts(
    run: RunDir, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(run, override(run.config(), settings))


def test_an_engine_has_a_gpu_for_each_of_its_parts() -> None:
    sizes, gpus = {"tensor_parallel_size": 8, "pipeline_parallel_size": 2}, {"resources": {"gpus": 16}}

    def check(serving: dict[str, Any]) -> None:
        check_devices(config_of(generation={"engine": sizes, **gpus}, serving=serving))

    for serving, message in (
        ({}, r"gpus: 0, but generation\.engine has tensor_parallel_size 8 × pipeline_parallel_size 2; set it to 16"),
        ({"engine": sizes, "resources": {"gpus": 8}}, r"gpus: 8, but serving\.engine .*; set it to 16"),
        ({"engine": {}, "resources": {"gpus": 2}}, "set it to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(serving)
    for serving in (gpus, {"engine": {}}, {"engine": {"gpu_memory_utilization": 0.4}, "resources": {"gpus": 0.5}}):
        check(serving)


def test_an_engine_needs_nodes_with_room_for_each_stage_and_with_its_label(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of two GPUs hold two stages of two, but no engine of one stage of four."""
    node = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node | {"Labels": {"pool": pool}} for pool in ("a", "b")])

    def check(sizes: str, labels: dict[str, str]) -> None:
        resources = json.dumps({"cpus": 4, "gpus": 4, "labels": labels})
        check_room(override(run.config(), {"serving.engine": sizes, "serving.resources": resources}))

    two_stages = "{tensor_parallel_size: 2, pipeline_parallel_size: 2}"
    check(two_stages, {"pool": "in(a,b)"})
    with pytest.raises(ResourceError, match="no node has 4 GPU, the most is 2; lower it"):
        check("{tensor_parallel_size: 4}", {})
    with pytest.raises(ResourceError, match=r"there is room for 1, .* is missing on nodes labelled {'pool': 'a'}"):
        check(two_stages, {"pool": "a"})


@pytest.mark.slow
def test_the_jobs_script_is_the_command(run: RunDir) -> None:
    script = [sys.executable, "jobs/serve.py", str(run.storage.root), "--models", "sft,gpt-4"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "serving.models: 'gpt-4' is none of sft" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_ray_must_be_locked_wherever_the_server_listens(
    host: str, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas have ports of their own, open to all interfaces (``test_real_server.py``)."""
    (tmp_path / "keys").write_text(f"alice {'a' * 64}\n")
    (tmp_path / "keys").chmod(0o600)
    config = override(run.config(), {"serving.host": host, "serving.keys": str(tmp_path / "keys")})
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=disabled"):
        check_settings(run, config)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_settings(run, config)


def test_a_port_that_is_taken_is_told_before_ray_starts(run: RunDir) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = override(run.config(), {"serving.port": str(taken.getsockname()[1])})
        with pytest.raises(ConfigError, match="Address already in use"):
            start(run, config)


def test_a_proxy_that_does_not_start_is_told_by_its_error(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "OSError: [Errno 99] Cannot assign requested address"
    printed = f"\x1b[36mray::ProxyActor.ready()\x1b[39m (pid=7)\nTraceback (most recent call last):\n  File x\n{told}"
    for name in ("connect_for", "check_vacant"):
        monkeypatch.setattr(server, name, Mock())
    monkeypatch.setattr(serve, "status", Mock(return_value=Mock(proxies={})))
    monkeypatch.setattr(serve, "start", Mock(side_effect=RayTaskError("ready", printed, OSError())))
    with pytest.raises(StageError) as error:
        start(run, override(run.config(), {"serving.ingress_replicas": "2"}))
    assert str(error.value) == f"Ray Serve's proxy did not start ({told}); is the machine overloaded?"


def test_a_service_on_a_cluster_needs_keys(run: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"serving\.keys"):
        build({"run": str(run.storage.root), "serving.models": ["sft"]})


def test_replicas_place_and_parts_of_an_engine_are_the_configs(run: RunDir, request: pytest.FixtureRequest) -> None:
    """The engine of two stages of two GPUs each gets a bundle for each GPU, on nodes with the label."""
    if not ray.is_initialized():  # ray.serve.llm asks it
        ray.init(address="local", num_cpus=1, include_dashboard=False)
        request.addfinalizer(ray.shutdown)

    def options(**settings: str) -> Any:
        config = override(run.config(), {f"serving.{name}": value for name, value in settings.items()})
        return build_engine(open_iterate(run, "sft"), config)._bound_deployment

    fixed = options(replicas="2", max_replicas="2", **{"resources.cpus": "3"})
    assert fixed.num_replicas == 2 and fixed._deployment_config.autoscaling_config is None
    scaling = options(max_replicas="4", target_ongoing_requests="5")._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 5)
    assert sum(bundle["CPU"] for bundle in fixed._replica_config.placement_group_bundles) == 3
    assert fixed._replica_config.placement_group_bundle_label_selector is None
    for given, taken in ((None, 21), (5, 21), (100, 100), (-1, -1)):
        extra = {} if given is None else {"max_logprobs": given}
        deployment = options(engine=json.dumps({"extra": extra}))
        llm_config = next(iter((*deployment.init_args, *deployment.init_kwargs.values())))
        assert llm_config.engine_kwargs["max_logprobs"] == taken
    sizes, labels = "{tensor_parallel_size: 2, pipeline_parallel_size: 2}", {"pool": "in(a,b)"}
    large = options(engine=sizes, resources=json.dumps({"cpus": 2, "gpus": 4, "labels": labels}))
    assert large._replica_config.placement_group_bundles == [{"CPU": 0.5, "GPU": 1.0}] * 4
    assert large._replica_config.placement_group_bundle_label_selector == [labels] * 4


def test_engines_that_share_a_card_start_one_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The processes of vLLM are Ray's, so that the replica knows only the node."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = override(
        tiny_config(),
        {
            "serving.resources.gpus": "0.5",
            "serving.start_timeout_s": "0.01",
            "generation.engine.gpu_memory_utilization": "0.45",
        },
    )
    first, second = (object.__new__(IterateEngine) for _ in range(2))
    first._config = second._config = config

    async def starts() -> None:
        async with first._alone_on_card(), second._alone_on_card():
            pass

    with pytest.raises(StageError, match=r"^serving\.start_timeout_s: after 0\.01 s another engine is .* on this node"):
        asyncio.run(starts())


def test_temperatures_are_refused_where_vllm_refuses_or_changes_them():
    least, most = TEMPERATURES
    assert [SamplingParams(temperature=value).temperature for value in (least / 2, least, most)] == [least, least, most]
    with pytest.raises(VLLMValidationError, match="temperature"):
        SamplingParams(temperature=most + 0.01)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (["self_attn.q_proj", "model.layers.1.self_attn.q_proj", "down_proj"], ["down_proj", "q_proj"]),
    ],
)
def test_an_engine_of_adapters_names_layers_as_vllm_does(run: RunDir, targets: Any, names: list[str]) -> None:
    """vLLM's own function finds the layers."""
    lora = {"rank": 4, "merge": False, "target_modules": targets}
    config = tiny_config(train={"global_batch_pairs": 8, "lora": lora})
    found = _for_adapters(config, open_iterate(run, "sft").folder)["lora_target_modules"]
    assert found == names
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert is_in_target_modules("model.layers.0.self_attn.qkv_proj", found, packed)
    assert not is_in_target_modules("lm_head", found, packed)


def test_an_embedded_ray_has_room_for_the_engine_that_replaces_another(run: RunDir) -> None:
    """Two engines of two CPUs, one more while latest moves, one CPU for the rest."""
    config = override(run.config(), {"serving.resources.cpus": "2"})
    cpus = with_room(config, engines=2).cluster.local_cpus
    assert cpus and cpus >= 7
    cpus = with_room(override(config, {"serving.replicas": "3"}), engines=2).cluster.local_cpus
    assert cpus and cpus >= 2 * 3 * 2 + 2 + 1
    fixed = override(config, {"cluster.local_cpus": "3"})
    assert with_room(fixed, engines=2).cluster.local_cpus == 3


def test_rows_to_compare_are_asked_without_their_last_answer_each_with_its_seed(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": [user, answer]}, {"prompt": "p"})))
    rows = list(read_rows(file, {"models": ["sft", "latest"], "seed": 5}))
    assert [[message.text for message in row.messages] for row in rows] == [["q"], ["p"]]
    assert [row.seed for row in rows] == [5, 6]


def test_a_row_to_compare_may_hold_every_mark_that_ends_a_line_elsewhere(tmp_path: Path) -> None:
    texts, file = ["one\u2028two\u2029three\x85four", "five\x0b\x0c\x1c"], tmp_path / "rows.jsonl"
    file.write_text("\r\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts), newline="")
    rows = read_rows(file, {"models": ["sft", "latest"], "seed": 0})
    assert [row.messages[0].text for row in rows] == texts


@pytest.mark.parametrize("line", ["{", "[]", '{"messages": []}', '{"prompt": 3}', '{"other": 1}'])
def test_a_row_that_cannot_be_compared_is_an_error_that_says_which(line: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match="row 2"):
        list(read_rows(file, {"models": ["sft", "latest"], "seed": 0}))


def test_a_file_is_compared_in_order_and_a_row_that_is_refused_stops_no_other(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{number}"}) + "\n" for number in range(9)))
    rows = list(read_rows(file, {"models": ["sft", "latest"], "seed": 0, "logprobs": True}))
    engines, out = FakeEngines(), io.StringIO()
    engines.refuse = "p4"
    asyncio.run(compare_rows(engines, tiny_config(max_concurrent=4), rows, out))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == [f"p{number}" for number in range(9)]
    assert [number for number, line in enumerate(lines) if "error" in line] == [4]
    assert lines[0]["engine_margins"][0]["value"] == 2.0
