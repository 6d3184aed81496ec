"""A head without CPUs and three nodes that share no file system: the run is on S3, the start model on the head alone.

Nodes join and are killed in the middle of the work. What comes of it is what comes of a quiet run, to the last bit.
"""

import http.client
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import obstore
import pytest
import ray.cloudpickle
import ray.train
import torch
import torch.distributed as dist
from safetensors.torch import load

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ResourceError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.model_folder import open_model
from spin_ray.loop.launch import run_spin
from spin_ray.run_dir import object_storage
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.object_storage import ObjectStorage
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.runtime import model_sharing as distribution
from spin_ray.runtime.engine import EngineSpec
from spin_ray.runtime.model_sharing import share
from spin_ray.runtime.placement import check_fits
from spin_ray.runtime.waiting import wait_until_free
from spin_ray.runtime.workers import run_workers
from tests.support.counting_giver import CountingGiver
from tests.support.fakes import FakeEngine
from tests.support.small_cluster import SmallCluster, may_hide, small_cluster, when

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import a test module
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
SHARDS, STEPS = 12, 24


def noting_engine(spec: EngineSpec, notes: Path, of: int) -> FakeEngine:
    """Starts an engine that notes where it plays; within the second shard it waits until ``of`` have begun to."""
    node = notes / ray.get_runtime_context().get_node_id()

    def note(call: int) -> None:
        node.touch()
        deadline = time.monotonic() + 90
        while call == 2 and len(list(notes.iterdir())) < of and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        with node.open("a") as played:
            played.write("shard\n")

    return FakeEngine(short=True, before=note)


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(resolve("embedded:tiny-llama"), tmp_path_factory.mktemp("head") / "model"))


@pytest.fixture(scope="module", autouse=True)
def local_ray(
    patch: pytest.MonkeyPatch, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SmallCluster]:
    """The cluster, in place of the folder's local Ray: nodes a and c for any work, b for engines only."""
    from moto.server import ThreadedMotoServer

    if not may_hide():
        pytest.skip("needs the right to make mount namespaces, to give each node files of its own")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    for name, value in {
        "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1", "ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        patch.setenv(f"AWS_{name}", value)
    folder = tmp_path_factory.mktemp("nodes")
    patch.setattr(object_storage, "CACHE", folder / "cache-head")
    patch.setattr(distribution, "PART_BYTES", 2**18)  # the weights are 1.3 MB
    patch.setattr(distribution, "_Giver", CountingGiver)
    with small_cluster(folder, hidden=model) as cluster:
        for name, pool in (("a", "any"), ("b", "engines"), ("c", "any")):
            cluster.add(name, pool)
        yield cluster
    server.stop()


@pytest.fixture(scope="module")
def nodes(local_ray: SmallCluster) -> SmallCluster:
    return local_ray


def config_of(nodes: SmallCluster, model: Path, **train: Any) -> SpinConfig:
    """One iteration: 48 prompts in 12 shards, 3 engines of a whole node each; 24 steps of 2 workers in pool `any`."""
    return SpinConfig.model_validate(
        {
            "model": {"path": str(model), "max_length": 128, "attention": "padded"},
            "data": {"train": resolve("embedded:arithmetic-train"), "max_rows": 4 * SHARDS},
            "iterations": 1,
            "generation": {
                "shard_rows": 4, "replicas": 3, "min_replicas": 2, "resources": {"cpus": 2},
                "sampling": {"max_tokens": 24},
            },
            "train": {
                "workers": 2, "resources": {"cpus": 1, "labels": {"pool": "any"}}, "precision": "fp32",
                "learning_rate": 1e-3, "epochs": 2, "global_batch_pairs": 4, "pack_length": 256,
                "checkpoint_every_steps": 2, **train,
            },
            "tracking": {"tensorboard": False},
            "cluster": {"address": nodes.address},
        }
    )  # fmt: skip


def play(config: SpinConfig, uri: str, notes: Path, engines: int, *helpers: Callable[[threading.Event], Any]) -> RunDir:
    """The run, with helpers that wait for their moment beside it."""
    notes.mkdir(exist_ok=True)
    done = threading.Event()
    threads = [helper(done) for helper in helpers]
    try:
        run = run_spin(config, uri, partial(noting_engine, notes=notes, of=engines)).run
    finally:
        done.set()
        for thread in threads:
            thread.join()
    return run


def played_on(notes: Path) -> Counter[str]:
    return Counter({node.name: len(node.read_text().splitlines()) for node in notes.iterdir()})


def weights_of(run: RunDir) -> dict[str, torch.Tensor]:
    return load(run.storage.read("iter_000/model/model.safetensors"))


def steps_of(uri: str) -> list[int]:
    return [line["step"] for line in read_json_lines(ObjectStorage(uri), "iter_000/train_log.jsonl")]


def reached(uri: str, step: int) -> bool:
    return (steps_of(uri) or [-1])[-1] >= step


@pytest.fixture(scope="module")
def calm(nodes: SmallCluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RunDir, Path]:
    """The run that nothing disturbed, and what its engines noted. Three nodes from the start."""
    notes = tmp_path_factory.mktemp("calm") / "notes"
    uri = "s3://bucket/calm"
    return uri, play(config_of(nodes, model), uri, notes, 3), notes


def test_replicas_spread_over_the_nodes_and_each_gets_the_model_once(
    nodes: SmallCluster, model: Path, calm: tuple[str, RunDir, Path]
) -> None:
    """1.3 MB in parts of 256 KiB to each of three nodes, whose train workers took it from their node's cache."""
    played = played_on(calm[2])
    assert set(played) == {nodes.id(name) for name in "abc"} and min(played.values()) > 0
    assert sum(played.values()) == SHARDS
    found = open_model(model, "sft")
    shared = share(found.path, found.files)  # as the run did
    assert shared is not None
    parts = {(name, part) for name, file in found.files.items() for part in range(max(1, -(-file.bytes // 2**18)))}
    asked = ray.get(ray.get_actor(shared.giver).asked.remote())
    assert asked == dict.fromkeys(parts, 3), "once by each node, and not by the head, which has it"
    for name in "abc":
        models = [path for path in nodes.cache(name).glob("*/*.safetensors")]
        assert [path.read_bytes() for path in models] == [(model / "model.safetensors").read_bytes()]


def test_a_label_that_no_node_has_is_an_error_at_once(nodes: SmallCluster, model: Path) -> None:
    config = config_of(nodes, model, resources={"cpus": 1, "labels": {"pool": "in(tpu, gpu)"}})
    with pytest.raises(
        ResourceError, match=r"train asks for 2 × 1 CPU .* on nodes labelled {'pool': 'in\(tpu, gpu\)'}"
    ):
        check_fits(config)


def test_a_node_that_joins_is_used_and_one_that_is_killed_changes_no_bit(
    nodes: SmallCluster, model: Path, calm: tuple[str, RunDir, Path], tmp_path: Path
) -> None:
    """Two nodes at first, so one of the three engines waits. A third joins once both play; of the two nodes that may
    train, the one that does is killed after step 4, and the other takes over from the last checkpoint.
    """
    nodes.kill("c")
    uri, notes = "s3://bucket/rough", tmp_path / "notes"
    trained_on: list[str] = []

    def join() -> None:
        nodes.add("d", "any")

    def kill() -> None:
        trained_on.extend(nodes.of_train_workers())
        nodes.kill(trained_on[0])

    run = play(
        config_of(nodes, model), uri, notes, 3,
        lambda done: when(lambda: len(list(notes.iterdir())) >= 2, join, unless=done),
        lambda done: when(lambda: reached(uri, 4), kill, unless=done),
    )  # fmt: skip
    assert len(trained_on) == 2 and set(trained_on) <= {"a", "d"}, "the selector keeps workers off node b"
    assert trained_on[0] not in nodes.names() and len(nodes.names()) == 2
    assert len(played_on(notes)) == 3 and min(played_on(notes).values()) > 0
    assert steps_of(uri) == list(range(STEPS))
    for artefact in ("iter_000/generations", "iter_000/pairs", "iter_000/reference"):
        assert run.artefact(artefact).manifest().files == calm[1].artefact(artefact).manifest().files
    expected, found = weights_of(calm[1]), weights_of(run)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_elastic_training_goes_on_with_fewer_and_ends_with_the_same_weights_to_rounding(
    nodes: SmallCluster, model: Path, calm: tuple[str, RunDir, Path], tmp_path: Path
) -> None:
    """Two workers on two nodes with one seat each; one node is killed, and one worker goes on from the checkpoint of
    two. The run is that of `calm` without what its training made.
    """
    uri, store = "s3://bucket/elastic", ObjectStorage("s3://bucket")._store
    for one in obstore.list(store, "calm/").collect():
        name = one["path"].removeprefix("calm/")
        # Of size 0 are what pyarrow leaves for folders, where Ray Train kept its checkpoints.
        if one["size"] and not name.startswith(("iter_000/model", "iter_000/train_log", "LATEST")):
            obstore.copy(store, one["path"], f"elastic/{name}")
    if len(nodes.names()) < 3:
        nodes.add("e", "any")
    nodes.tell_trainers()
    before: list[str] = []

    def kill() -> None:
        before.extend(nodes.of_train_workers())
        nodes.kill(before[-1])

    resources = {"cpus": 1, "custom": {"seat": 1}, "labels": {"pool": "any"}}
    # The last run's workers may still hold theirs; an elastic group would begin with what is free.
    wait_until_free(config_of(nodes, model, resources=resources), "train", "training")
    config = config_of(nodes, model, min_workers=1, resources=resources)
    run = play(config, uri, tmp_path / "notes", 3, lambda done: when(lambda: reached(uri, 3), kill, unless=done))
    assert len(set(before)) == 2, "two workers before, and then there is one seat"
    assert steps_of(uri) == list(range(STEPS))
    expected, found = weights_of(calm[1]), weights_of(run)
    start = load((model / "model.safetensors").read_bytes())
    moved = max((weight - start[name].float()).abs().max().item() for name, weight in expected.items())
    apart = max((found[name] - weight).abs().max().item() for name, weight in expected.items())
    assert apart < 1e-2 * moved


def _stays_until_there_are_two(folder: Path) -> int:
    """Work in steps with a checkpoint after each, that ends when a second worker has joined; the step it began with."""
    checkpoint, first = ray.train.get_checkpoint(), 0
    if checkpoint is not None:
        with checkpoint.as_directory() as saved:
            first = int((Path(saved) / "step").read_text())
    for step in range(first, first + 600):
        if dist.get_world_size() == 2:
            return first
        (folder / "alone").touch()
        (folder / "step").write_text(str(step + 1))
        ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        time.sleep(0.2)
    raise TimeoutError("waited for a second worker")


def test_an_elastic_group_grows_from_its_last_checkpoint_when_a_node_joins(
    nodes: SmallCluster, model: Path, tmp_path: Path
) -> None:
    """One seat at first, so one worker."""
    for name in [name for name in nodes.names() if name != "b"][1:]:
        nodes.kill(name)
    config = config_of(
        nodes, model, min_workers=1, resize_interval_s=1,
        resources={"cpus": 1, "custom": {"seat": 1}, "labels": {"pool": "any"}},
    )  # fmt: skip
    work, done = tmp_path / "work", threading.Event()
    work.mkdir()

    def join() -> None:
        nodes.add("f", "any")
        nodes.tell_trainers()

    joining = when((work / "alone").exists, join, unless=done)
    try:
        first = run_workers(_stays_until_there_are_two, work, config, "grow", tmp_path / "checkpoints")
    finally:
        done.set()
        joining.join()
    assert first > 0, "it went on, not from the start"
