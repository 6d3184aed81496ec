"""Prompts, generation and pairs through real Ray Data, with a fake engine: what is written, resumed and refused."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
import ray.experimental.internal_kv
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import ConfigError, DataError, ResourceError, StageError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.loop.stages import pairs
from spin_ray.loop.stages.generation import stage as generation
from spin_ray.loop.stages.prompts import stage as prompts
from spin_ray.loop.stages.prompts.slices import RenderSlice
from spin_ray.report import grading
from spin_ray.report.grading import check_on_workers
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from spin_ray.runtime import autoscaler
from spin_ray.runtime.engine import EngineSpec, StartEngine
from spin_ray.runtime.imports import check_imports
from spin_ray.runtime.placement import check_fits, ray_train_asks, room_for
from spin_ray.runtime.waiting import wait_until_free
from tests.support.fakes import FakeEngine, seed_engine

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import a test module


def silent_engine(_: EngineSpec) -> FakeEngine:
    """Starts an engine that answers when nobody waits any more."""
    return FakeEngine(before=lambda call: time.sleep(8))


def make_config(**changes: object) -> SpinConfig:
    sections = {
        "model": {"path": resolve("embedded:tiny-llama"), "max_length": 128},
        "data": {"train": resolve("embedded:arithmetic-train"), "max_rows": 50},
        "generation": {"shard_rows": 16, "sampling": {"max_tokens": 24}, "resources": {"cpus": 0.5}},
        "train": {"global_batch_pairs": 4, "pack_length": 256},
    }
    for name, section in changes.items():
        sections[name] = sections.get(name, {}) | section
    return SpinConfig.model_validate(sections)


def make_prompts(run: RunDir, config: SpinConfig) -> None:
    prompts.run(run, config, config.model.path, prompts.RowsOf.training(run, config, config.data.train))


def play(run: RunDir, config: SpinConfig, start_engine: StartEngine = seed_engine) -> None:
    spec = EngineSpec(
        model=Path(config.model.path), max_length=128, stop_token_id=2, threads=1, config=config.generation.engine
    )
    job = generation.Job(
        run.prompts, run.generations(0), ModelFolder(Path(config.model.path), "digest of the opponent", "sft", 0)
    )
    generation.run(run, config, spec, [job], start_engine)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], RunDir]:
    """Copies a run with prompts and answers into a folder; it is made once, not before the test has a Ray."""

    def make() -> Path:
        folder, config = tmp_path_factory.mktemp("played"), make_config()
        make_prompts(RunDir(Storage(folder)), config)
        play(RunDir(Storage(folder)), config)
        return folder

    made = cache(make)
    return lambda folder: RunDir(Storage(shutil.copytree(made(), folder, dirs_exist_ok=True)))


class DiesOfHugeRows(RenderSlice):
    """A slice of ``huge.jsonl`` takes its process along, as one that the kernel kills."""

    def _render(self, item: dict[str, Any], read: Any) -> bytes:
        if item["uri"].endswith("huge.jsonl"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._render(item, read)


def test_rows_whose_process_dies_again_and_again_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data started it again without end; an hour later the error named no file."""
    monkeypatch.setattr(prompts, "RenderSlice", DiesOfHugeRows)
    for name in ("small", "huge"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    config = make_config(data={"train": f"{tmp_path}/*.jsonl"})
    said = (
        r"huge\.jsonl, bytes 0 to \d+: a process that rendered these rows died 6 times, most likely as memory ran out"
    )
    with pytest.raises(StageError, match=said):
        make_prompts(RunDir(Storage(tmp_path / "run")), config)


def dies(_: dict[str, Any]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_process_that_dies_before_it_reads_a_row_is_not_started_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "RenderSlice", lambda *_: dies)
    with pytest.raises(
        StageError,
        match=r"arithmetic.*: cannot be rendered: a process was killed by the system or crashed.*; run",
    ):
        make_prompts(RunDir(Storage(tmp_path)), make_config())


def test_every_prompt_is_answered_once_and_paired_once(tmp_path: Path, played: Callable[[Path], RunDir]) -> None:
    """50 prompts in shards of 16 make 4 shards, 50 answers and 50 pairs, in the order of the prompts."""
    run, config = played(tmp_path), make_config()
    pairs.run(run, config, 0)
    ids = [prompt_id for table in run.prompts.tables() for prompt_id in table["prompt_id"].to_pylist()]
    answered = [prompt_id for table in run.generations(0).tables() for prompt_id in table["prompt_id"].to_pylist()]
    paired = [prompt_id for table in run.pairs(0).tables() for prompt_id in table["prompt_id"].to_pylist()]
    assert len(set(ids)) == 50
    assert answered == ids
    assert paired == ids
    assert len(run.generations(0).part_names()) == 4


def test_a_second_run_makes_only_what_is_missing(tmp_path: Path, played: Callable[[Path], RunDir]) -> None:
    """With one of four shards gone and no manifest, that one is made again and the others keep their bytes."""
    run, config = played(tmp_path), make_config()
    folder = tmp_path / "iter_000" / "generations"
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.glob("part-*")}
    (folder / "_MANIFEST.json").unlink()
    (folder / "part-00002.parquet").unlink()
    play(run, config)
    after = {path.name: (path.read_bytes(), path.stat().st_ino) for path in folder.glob("part-*")}
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    assert [name for name in before if before[name][1] != after[name][1]] == ["part-00002.parquet"]
    assert run.events()[-1]["shards_found"] == 3


def test_a_finished_stage_starts_no_engine(tmp_path: Path, played: Callable[[Path], RunDir]) -> None:
    run, config = played(tmp_path), make_config()
    events = len(run.events())
    play(run, config, silent_engine)
    make_prompts(run, config)
    assert len(run.events()) == events


def test_an_engine_that_never_answers_ends_in_an_error_that_says_what_was_waited_for(tmp_path: Path) -> None:
    run, config = RunDir(Storage(tmp_path)), make_config(generation={"start_timeout_s": 3, "shard_timeout_s": 2})
    make_prompts(run, config)
    with pytest.raises(StageError, match="waited 5 s for a generation shard"):
        play(run, config, silent_engine)


def test_bad_rows_are_quarantined_with_file_line_and_reason(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    good = [{"prompt": f"{number} + 1 = ?", "response": str(number + 1)} for number in range(40)]
    lines = [json.dumps(row) for row in good] + ["{broken", json.dumps(good[0])]
    data.write_text("\n".join(lines) + "\n")
    run, config = (
        RunDir(Storage(tmp_path / "run")),
        make_config(data={"train": str(data), "max_quarantine_fraction": 0.1}),
    )
    make_prompts(run, config)
    from spin_ray.run_dir.storage import table_from_bytes

    found = table_from_bytes(run.storage.read("quarantine/prompts.parquet")).to_pylist()
    assert {(row["origin"], row["reason"]) for row in found} == {
        (f"{data}:41", "malformed"),
        (f"{data}:42", "duplicate"),
    }
    assert run.prompts.manifest().counts == {"malformed": 1, "duplicate": 1}
    assert [row["row"] for row in found if row["reason"] == "malformed"] == [b"{broken"]


def test_rows_of_several_sources_are_drawn_and_counted(tmp_path: Path) -> None:
    """Of 30 and 20 rows, weights of 2 and 1 give 30 and 15. The same call again makes nothing."""
    paths = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for path, count in zip(paths, (30, 20), strict=True):
        path.write_text("\n".join(json.dumps({"prompt": f"{path.stem}{i}", "response": "r"}) for i in range(count)))
    train = [{"path": str(path), "weight": weight} for path, weight in zip(paths, (2, 1), strict=True)]
    run, config = RunDir(Storage(tmp_path / "run")), make_config(data={"train": train, "max_rows": None})
    make_prompts(run, config)
    asked = [json.loads(text)[0]["content"] for table in run.prompts.tables() for text in table["messages"].to_pylist()]
    assert [sum(text.startswith(name) for text in asked) for name in "ab"] == [30, 15]
    assert run.events()[-1]["sources"] == {str(paths[0]): 30, str(paths[1]): 15}
    events = len(run.events())
    make_prompts(run, config)
    assert len(run.events()) == events


def test_a_damaged_parquet_file_is_one_line_though_a_task_found_it(tmp_path: Path) -> None:
    """The footer, which the driver reads, is whole; the pages of the rows are not."""
    data = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["1 + 1 = ?"] * 50, "response": [str(n) for n in range(50)]}), data)
    data.write_bytes(data.read_bytes()[:4] + b"\xff" * 40 + data.read_bytes()[44:])
    run, config = RunDir(Storage(tmp_path / "run")), make_config(data={"train": str(data)})
    with pytest.raises(DataError, match=r"rows.parquet: is damaged near row 0") as raised:
        make_prompts(run, config)
    assert "\n" not in str(raised.value)


def test_a_grader_that_workers_cannot_import_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    here = ModuleType("only_on_the_driver")
    here.grade = float  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, here.__name__, here)
    check_on_workers({"evaluation.grade": "exact", "scorer.path": "operator:eq"}, 60)
    with pytest.raises(ConfigError, match=r"on the workers, self_filter\.grade: only_on_the_driver:grade cannot"):
        check_on_workers({"self_filter.grade": "only_on_the_driver:grade"}, 60)


def test_a_loss_that_workers_cannot_import_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = ModuleType("only_on_the_driver")
    here.loss = float  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, here.__name__, here)
    check_imports([("objective.loss", "operator:neg"), ("optimizer.name", "torch.optim:Adam")], 60)
    with pytest.raises(
        ConfigError, match=r"on the workers, objective\.loss: only_on_the_driver:loss cannot be imported"
    ):
        check_imports([("objective.loss", "operator:neg"), ("objective.loss", "only_on_the_driver:loss")], 60)


def test_a_grader_that_gives_no_number_is_said_at_the_start() -> None:
    check_on_workers({"scorer.path": "operator:eq"}, 60, {"scorer.path": ("a", "a", "d:1")})
    with pytest.raises(DataError, match=r"^scorer\.path operator:add: gave 'ab' for the row d:1; expected 0 to 1"):
        check_on_workers({"scorer.path": "operator:add"}, 60, {"scorer.path": ("a", "b", "d:1")})


def hang_on_the_first(grade: str, response: str, answer: str, *_: str) -> float:
    if answer == "0":
        time.sleep(600)
    return 0.5


@pytest.fixture
def own_grader(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A grader of the user's, which hangs on the answer 0 and when it is imported."""
    monkeypatch.setattr(grading, "graded", hang_on_the_first)
    monkeypatch.setattr(grading, "find_grader", lambda grade, setting: time.sleep(600))
    ray.cloudpickle.register_pickle_by_value(grading)  # workers get it as it is here
    yield "mine:grade"
    ray.cloudpickle.unregister_pickle_by_value(grading)


def test_a_grader_whose_process_dies_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's text only names a pattern of its log files."""
    monkeypatch.setattr(grading, "graded", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(grading, "find_grader", lambda *_: None)
    ray.cloudpickle.register_pickle_by_value(grading)
    try:
        with pytest.raises(StageError) as caught:
            check_on_workers({"evaluation.grade": "mine:grade"}, 120, {"evaluation.grade": ("a", "a", "d:1")})
    finally:
        ray.cloudpickle.unregister_pickle_by_value(grading)
    assert str(caught.value) == (
        "evaluation.grade mine:grade: a process was killed by the system or crashed; run the command again"
    )


def test_a_grader_that_hangs_is_an_error_that_names_setting_grader_and_rows_and_gives_its_cpu_back(
    own_grader: str,
) -> None:
    """Of 600 rows in three tasks the first hangs; the other two end."""
    rows = [("response", str(number), f"row-{number}") for number in range(600)]
    config = make_config(generation={"shard_timeout_s": 15})
    assert grading.grade_all(own_grader, rows[1:], config) == [0.5] * 599
    waited = (
        r"^evaluation\.grade mine:grade: waited 15 s \(generation\.shard_timeout_s\) for the grades of 256 rows, "
        r"row-0 to row-255; the cluster has 2 CPU .*run the command again$"
    )
    with pytest.raises(StageError, match=waited):
        grading.grade_all(own_grader, rows, config)
    both = make_config(train={"workers": 2, "global_batch_pairs": 4, "pack_length": 256})
    wait_until_free(both, "train", "both CPUs")


def test_a_grader_that_finds_no_cpu_is_an_error_too(own_grader: str) -> None:
    taken = [ray.remote(lambda: time.sleep(600)).options(num_cpus=1).remote() for _ in range(2)]
    config = make_config(generation={"shard_timeout_s": 2})
    try:
        with pytest.raises(StageError, match=r"waited 2 s .* of 1 rows, row-1 to row-1; .* half a CPU was never free"):
            grading.grade_all(own_grader, [("response", "1", "row-1")], config)
    finally:
        for task in taken:
            ray.cancel(task, force=True)


def test_a_grader_whose_import_hangs_is_said_at_the_start(own_grader: str) -> None:
    with pytest.raises(StageError, match=r"self_filter\.grade mine:grade: waited 1 s for a worker to import it"):
        check_on_workers({"self_filter.grade": own_grader}, 1)


def test_a_stage_that_cannot_be_placed_is_refused_at_once() -> None:
    config = make_config(train={"workers": 3, "global_batch_pairs": 4, "pack_length": 256})
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"train asks for 3 × 1 CPU .*but the cluster has: 2 CPU"):
        check_fits(config)
    assert time.monotonic() - started < 5


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that reached Ray's autoscaler."""
    asked: list[Any] = []

    def ask(request: autoscaler.Request) -> None:
        send(request)
        asked.append(kept_by_the_autoscaler())

    send = autoscaler.send
    monkeypatch.setattr(autoscaler, "send", ask)
    return asked


def kept_by_the_autoscaler() -> Any:
    return json.loads(ray.experimental.internal_kv._internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL))


def test_a_request_for_nodes_reaches_rays_autoscaler_and_is_withdrawn(asked: list[Any]) -> None:
    workers = {"workers": 3, "resources": {"labels": {"pool": "a"}}}
    with (
        pytest.raises(ResourceError, match="train asks for 3 × 1 CPU"),
        room_for(make_config(train=workers, cluster={"wait_for_nodes_s": 0.2})),
    ):
        pass
    assert asked[0] == [{"CPU": 1.0}] * 3, "in whose room the engine plays"
    assert asked[-1] == []


def test_the_request_outlives_ray_datas_own_and_takes_no_resources_from_it(tmp_path: Path) -> None:
    """Ray Data renders the prompts. Its empty request, and each look of Ray's coordinator, replace other requests.

    Two engines of half a CPU and two workers of one: the workers' 2 CPUs. Ray Data has both at the same time.
    """
    train = {"workers": 2, "global_batch_pairs": 4, "pack_length": 256}
    config = make_config(generation={"replicas": 2}, train=train, cluster={"wait_for_nodes_s": 60})
    coordinator = get_or_create_autoscaling_coordinator()

    def look_again() -> None:
        assert ray.get(coordinator.get_reserved_resources.remote("nobody", recompute=True)) == {}

    with room_for(config):
        make_prompts(RunDir(Storage(tmp_path)), config)
        look_again()
        assert kept_by_the_autoscaler() == [{"CPU": 1.0}] * 2
        ray.get(coordinator.request_resources.remote("data", [], 60, request_remaining=["CPU"]))
        assert sum(found["CPU"] for found in ray.get(coordinator.get_reserved_resources.remote("data")).values()) == 2
        ray.get(coordinator.cancel_request.remote("data"))
        with ray_train_asks(config):
            assert kept_by_the_autoscaler() == [], "Ray Train asks for its workers, and the sum would be 4"
        assert kept_by_the_autoscaler() == [{"CPU": 1.0}] * 2
    look_again()
    assert kept_by_the_autoscaler() == []


def test_so_does_the_request_of_a_stage_whose_nodes_have_gone(asked: list[Any]) -> None:
    train = {"workers": 3, "global_batch_pairs": 4, "pack_length": 256, "start_timeout_s": 0.1}
    with pytest.raises(StageError, match="there is room for 2, 1 CPU is missing"):
        wait_until_free(make_config(train=train, cluster={"wait_for_nodes_s": 0.2}), "train", "the train workers")
    assert asked[0] == [{"CPU": 1.0}] * 3 and asked[-1] == []
