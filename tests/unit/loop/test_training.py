"""Training below Ray and torch.distributed: what identifies the work, rows and reference scores in their places."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh
from spin_ray.errors import ModelError, RunDirError
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.learner import step as loop
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.loop.algorithms.base import margin_objective
from spin_ray.loop.stages.training import stage as training
from spin_ray.loop.stages.training import worker
from spin_ray.loop.stages.training.job import TrainJob
from spin_ray.loop.stages.training.log import TrainLog, Watcher
from spin_ray.report.progress import StageProgress
from spin_ray.run_dir import events
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA, REFERENCE_SCHEMA
from spin_ray.run_dir.storage import Storage
from tests.support.fakes import config_of, write_prompts, write_rows
from tests.support.made_up_run import TINY

torch.set_num_threads(1)
real_train = training._train
PAIRS = [
    {
        "pair_id": f"p{i}/000/0",
        "prompt_id": f"p{i}",
        "iteration": 0,
        "prompt_ids": [1, i],
        "real_ids": [5, 2],
        "generated_ids": [6, 2],
    }
    for i in range(4)
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "device", lambda: torch.device("cpu"))
    run = RunDir(Storage(tmp_path))
    write_rows(run.pairs(0), PAIR_SCHEMA, PAIRS, part_rows=3)
    return run


@pytest.fixture
def jobs(run, monkeypatch):
    """The jobs that the stage hands to the workers, instead of doing them."""
    found: list[TrainJob] = []
    monkeypatch.setattr(training, "_train", lambda run_dir, config, job: found.append(job))
    return found


def start_model(pad_id: int = 7) -> ModelFolder:
    return ModelFolder(Path(TINY), "digest of θ_t", "sft", pad_id)


def train(run: RunDir, config: SpinConfig, iteration: int) -> None:
    training.run(run, config, iteration, start_model(), margin_objective(config, iteration))


@pytest.mark.parametrize("lora", [None, {"rank": 4}, {"rank": 4, "merge": False}])
@pytest.mark.parametrize(("backend", "compiled"), [("fsdp2", "auto"), ("deepspeed", False)])
def test_training_is_compiled_if_the_scores_of_its_references_are(run, jobs, backend, compiled, lora):
    """DeepSpeed compiles nothing; θ_0 and held-out rows are scored by FSDP2 all the same."""
    config = config_of(train={"backend": backend, "lora": lora})
    train(run, config, 0)
    assert jobs[0].backend.compile == BackendSettings.for_scoring(config).compile == compiled


def write_reference(run: RunDir, rows: list[tuple[str, float, float]]) -> None:
    names = REFERENCE_SCHEMA.names
    write_rows(run.reference(0), REFERENCE_SCHEMA, [dict(zip(names, row, strict=True)) for row in rows], part_rows=2)


# The work


def test_an_iteration_trains_from_its_opponent_with_its_own_values(run, jobs):
    config = config_of(
        iterations=2, objective={"beta": [0.1, 5.0], "loss": "hinge", "sft_weight": 0.5},
        train={"learning_rate": [5e-7, 1e-7], "epochs": [2, 1], "global_batch_pairs": 16},
    )  # fmt: skip
    train(run, config, 1)
    (job,) = jobs
    assert (job.name, job.target.path, job.rows.path, job.reference.path) == (
        "iter_001", "iter_001/model", "iter_001/pairs", "iter_001/reference",
    )  # fmt: skip
    assert (job.objective.loss, job.objective.beta, job.objective.sft_weight) == ("hinge", 5.0, 0.5)
    assert (job.backend.learning_rate, job.epochs, job.shape.global_batch_pairs) == (1e-7, 1, 16)
    assert (job.start.name, job.shape.pad_id) == ("sft", 7)


def test_the_warm_up_trains_on_the_prompts_without_reference_or_pairs(run, jobs):
    write_prompts(run.prompts, 3, 3)
    training.run_sft(run, config_of(sft={"epochs": 3, "global_batch_rows": 8}), start_model())
    (job,) = jobs
    assert (job.target.path, job.rows.path, job.reference, job.objective.loss) == ("sft/model", "prompts", None, None)
    assert (job.epochs, job.shape.global_batch_pairs, job.backend.learning_rate) == (3, 8, 2e-5)


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"beta": 1.0}},
        {"objective": {"loss": "hinge"}},
        {"objective": {"sft_weight": 0.1}},
        {"objective": {"length_normalised": True}},
        {"objective": {"reference_alpha": 0.5}},
        {"train": {"learning_rate": 1e-6}},
        {"train": {"epochs": 1}},
        {"train": {"precision": "fp32"}},
        {"train": {"pack_length": 8192}},
        {"train": {"global_batch_pairs": 32}},
        {"train": {"optimizer": {"name": "adamw"}}},
        {"seed": 1},
    ],
)
def test_a_model_of_other_values_is_another_work(run, jobs, sections):
    for changed in ({}, sections):
        train(run, config_of(**changed), 0)
    assert jobs[0].settings() != jobs[1].settings()
    assert jobs[0].inputs() == jobs[1].inputs()


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"checkpoint_every_steps": 1}},
        {"train": {"max_failures": 9}},
        {"train": {"gradient_checkpointing": True}},
    ],
)
def test_a_model_of_other_precautions_is_the_same_work(run, jobs, sections):
    for changed in ({}, sections):
        train(run, config_of(**changed), 0)
    assert jobs[0].settings() == jobs[1].settings()


def test_a_template_that_has_gone_is_named(run, jobs, tmp_path):
    config = config_of(model={"path": "m", "chat_template": str(tmp_path / "mine.jinja")})
    with pytest.raises(ModelError, match=r"mine\.jinja: cannot be read"):
        train(run, config, iteration=0)


def test_iterations_shuffle_differently(run, jobs):
    for iteration in (0, 1):
        train(run, config_of(seed=5), iteration)
    assert [job.seed for job in jobs] == [5, 6]


# Rows


def test_pairs_are_read_as_they_are(run):
    assert [row for part in worker._pairs(run.pairs(0)) for row in part.to_pylist()] == PAIRS


def test_each_rank_keeps_the_tokens_of_its_own_packs_and_all_pair_ids(run):
    """Eight pairs in four packs over three ranks: two packs for the first; one, and one of padding, for the others."""
    write_rows(run.pairs(1), PAIR_SCHEMA, [{**PAIRS[0], "pair_id": f"q{i}", "prompt_id": f"q{i}"} for i in range(8)], 3)
    pairs = run.pairs(1)
    shape = loop.PackShape(pack_length=12, global_batch_pairs=8, pad_id=0)
    epochs = loop.plan(loop.pair_lengths(worker._pairs(pairs)), shape, epochs=2, seed=0)
    shares = [worker._share(worker._pairs(pairs), loop.rows_of_rank(epochs, rank, 3)) for rank in range(3)]
    whole = pa.concat_tables(worker._pairs(pairs))
    for rank, share in enumerate(shares):
        assert share["pair_id"].equals(whole["pair_id"])
        packs = [pack for (step,) in epochs for pack in step.for_rank(rank, 3)]
        used = {row for pack in packs for tree in pack for row in tree}
        assert {row for row in range(8) if share["real_ids"][row].is_valid} == used
        for pack in packs:
            mine, all_of = (shape.build(pack, table) for table in (share, whole))
            assert torch.equal(mine.input_ids, all_of.input_ids) and torch.equal(mine.pair_row, all_of.pair_row)
    with pytest.raises(AttributeError):  # never as if it were an empty response
        shape.build((((set(range(8)) - loop.rows_of_rank(epochs, 0, 3)).pop(),),), shares[0])


def test_prompts_become_rows_without_a_generated_response(run):
    write_prompts(run.prompts, count=2, part_rows=1)
    assert [row for part in worker._pairs(run.prompts) for row in part.to_pylist()][1] == {
        "pair_id": "p001", "prompt_id": "p001", "iteration": 0,
        "prompt_ids": [1, 1], "real_ids": [11, 2], "generated_ids": [],
    }  # fmt: skip


# Reference scores


def test_reference_scores_are_matched_by_pair_whatever_their_order(run):
    """Ranks write them in the order of their packs."""
    write_reference(run, [(f"p{i}/000/0", -i, -10 * i) for i in (2, 0, 3, 1)])
    scores = worker._load_reference(run.reference(0), pa.concat_tables(worker._pairs(run.pairs(0))))
    assert scores.real.tolist() == [0, -1, -2, -3]
    assert scores.generated.tolist() == [0, -10, -20, -30]
    assert scores.real.dtype == torch.float32


@pytest.mark.parametrize("names", [(0, 1, 2), (0, 1, 2, 9), (0, 1, 2, 3, 3), (0, 1, 2, 3, 9)])
def test_a_missing_surplus_or_double_score_is_an_error(run, names):
    write_reference(run, [(f"p{i}/000/0", 0.0, 0.0) for i in names])
    with pytest.raises(RunDirError, match=rf"iter_000/reference: {len(names)} scores for 4 pairs"):
        worker._load_reference(run.reference(0), pa.concat_tables(worker._pairs(run.pairs(0))))


def test_scores_of_pairs_with_one_pair_id_are_an_error(run):
    """They would all get the first one's."""
    write_reference(run, [(f"p{i}/000/0", 0.0, 0.0) for i in (0, 0)])
    (pairs, *_) = worker._pairs(run.pairs(0))
    with pytest.raises(RunDirError, match="iter_000/reference: pairs share a pair_id"):
        worker._load_reference(run.reference(0), pairs.take(pa.array([0, 0])))


def test_a_reference_of_another_start_model_is_refused(run, jobs):
    """A moved policy must never be taken for θ_t."""
    train(run, config_of(), 0)
    job = jobs[0]
    job.reference.commit({}, job.inputs() | {"start_model": "another"}, {})
    with pytest.raises(RunDirError, match="start_model"):
        worker._score_reference(job, backend=None, steps=[], table=pa.table({}))


# The log


def log_of(run: RunDir, jobs: list[Any], first: int) -> Any:
    train(run, config_of(), 0)
    return TrainLog(jobs[-1], first)


def test_the_log_goes_on_from_the_checkpoint_and_steps_after_it_are_done_again(run, jobs, monkeypatch):
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 0)
    log = log_of(run, jobs, first=0)
    for step in range(5):
        log.write({"step": step, "loss": 1.0})
    log = log_of(run, jobs, first=3)
    log.write({"step": 3, "loss": 2.0})
    lines = read_json_lines(run.storage, "iter_000/train_log.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_line_that_a_crash_cut_short_is_cut_off(run, jobs, monkeypatch):
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 0)
    run.storage.append("iter_000/train_log.jsonl", '{"step": 0}\n{"st')
    log_of(run, jobs, first=1).write({"step": 1})
    assert run.storage.read("iter_000/train_log.jsonl") == b'{"step": 0}\n{"step": 1}\n'


def test_other_ranks_do_not_wait_while_rank_0_hashes_and_uploads_the_model(run, jobs, monkeypatch):
    """No process group is there: each collective would fail. One of them ended an upload of half an hour."""
    train(run, config_of(), 0)
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 1)
    gathered = []
    worker._export(jobs[-1], SimpleNamespace(export_hf=gathered.append))
    assert len(gathered) == 1


def test_only_rank_0_writes_the_log(run, jobs, monkeypatch):
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 1)
    log_of(run, jobs, first=0).write({"step": 0})
    assert not run.storage.exists("iter_000/train_log.jsonl")


# The progress of the log


def log_steps(run: RunDir, steps: range, seconds: float = 100.0, kept: int | None = None) -> None:
    """Logs steps of 500 tokens each. With ``kept``, the log is first cut to so many."""
    path = "iter_000/train_log.jsonl"
    if kept is not None:
        lines = read_json_lines(run.storage, path)[:kept]
        run.storage.replace(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    for step in steps:
        line = {"step": step, "loss": 1.0, "tokens": 500.0, "seconds": seconds, "of": 64}
        run.storage.append(path, json.dumps(line) + "\n")


@pytest.fixture
def watch(run, jobs, monkeypatch):
    """Begins to watch the log as it is at the first call; returns the shown words and the seconds left."""
    monkeypatch.setattr(StageProgress, "current", None)
    watchers: list[Watcher] = []

    def look() -> tuple[str, float | None]:
        if not watchers:
            train(run, config_of(), 0)
            watchers.append(Watcher(jobs[-1]))
        watchers[0]._look()
        shown = StageProgress.current
        return (shown.rates(), shown.seconds_left) if shown else ("", None)

    return look


def test_rates_of_training_are_those_of_the_logged_seconds(run, watch):
    """The steps are all seen at once; they took 100 s each, with 500 tokens."""
    assert watch() == ("", None)
    log_steps(run, range(6))
    assert watch() == ("6/64 steps, 0.01 steps/s, 5 tokens/s", 5800)


def test_steps_of_an_earlier_driver_are_done_but_no_part_of_the_rate(run, watch):
    """It logged ten steps of 100 s; the last checkpoint has eight. Two more take 50 s each."""
    log_steps(run, range(10))
    assert watch() == ("10/64 steps, 0.00 steps/s, 0 tokens/s", None)
    log_steps(run, range(0), kept=8)
    assert watch() == ("8/64 steps, 0.00 steps/s, 0 tokens/s", None)
    log_steps(run, range(8, 10), seconds=50)
    assert watch() == ("10/64 steps, 0.02 steps/s, 10 tokens/s", 2700)


def test_steps_that_are_done_again_count_once(run, watch):
    """A worker died after six steps of 100 s; its checkpoint has four, and the fifth takes 60 s."""
    watch()
    log_steps(run, range(6))
    log_steps(run, range(0), kept=4)
    assert watch()[0].startswith("4/64 steps")
    log_steps(run, range(4, 5), seconds=60)
    assert watch() == ("5/64 steps, 0.01 steps/s, 5 tokens/s", pytest.approx(59 * 92))


def test_a_training_counts_the_kept_steps_of_all_its_worker_groups(run, jobs, monkeypatch):
    """Steps 0 and 1 are an earlier driver's. The first workers die after step 5, the next go on from 4 with 10 s."""
    log_steps(run, range(3))
    train(run, config_of(), 0)
    clock = [0.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: clock[0])

    def work_twice(*_: Any, **__: Any) -> dict[str, float]:
        log_steps(run, range(2, 6), seconds=101, kept=2)
        log_steps(run, range(4, 8), seconds=102, kept=4)
        clock[0] = 1000.0
        return {"work_s": 10.0}

    monkeypatch.setattr(training, "run_workers", work_twice)
    real_train(run, config_of(), jobs[-1])
    commit = run.events()[-1]
    assert (commit["steps"], commit["tokens"], commit["tokens_per_s"]) == (6, 3000, 3.0)
    assert commit["useful"] == pytest.approx((10 + 2 * 101 + 4 * 102) / 1000)


def test_a_training_that_adds_up_offloaded_gradients_says_so_once(monkeypatch, caplog):
    """20 packs of a step on two shards; the first worker says it."""
    recipe = config_of(train={"workers": 2, "offload": True, "resources": {"gpus": 1}})
    start: Any = SimpleNamespace(parts_here=lambda: ("folder", None))
    job: Any = SimpleNamespace(recipe=recipe, start=start, backend=BackendSettings(max_length=8))
    monkeypatch.setattr(worker, "parameters_of", lambda folder: 8_000_000_000)
    for rank in range(2):
        monkeypatch.setattr(worker.dist, "get_rank", lambda rank=rank: rank)
        worker._warn_of_offload(job, 10, Mesh(shard=2))
    [told] = caplog.messages
    assert "16.0 GB of gradients" in told and "in about 10 packs" in told
