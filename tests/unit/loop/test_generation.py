"""The opponent plays, below Ray: each prompt once, in shards that a retry repeats exactly."""

import pickle
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import ResourcesConfig
from spin_ray.errors import RunDirError
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.loop.stages.generation import stage as generation
from spin_ray.loop.stages.generation.shards import Job, cut_into_shards, find_parts, prompt_slice, row_count
from spin_ray.loop.stages.generation.stage import row_seed
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage, table_from_bytes, table_to_bytes
from spin_ray.runtime.engine import Completion
from tests.support.fakes import END_OF_TURN, FakeEngine, config_of, rows_of, write_prompts


def config_for(shard_rows: int = 4, samples: int = 1, **sections: Any) -> SpinConfig:
    played = {"shard_rows": shard_rows, "samples_per_prompt": samples, "sampling": {"max_tokens": 6}}
    return config_of(**{"generation": played} | sections)


def job_of(run: RunDir, rows: np.ndarray | None = None, opponent: str = "sft", digest: str = "d0") -> Job:
    return Job(run.prompts, run.generations(0), ModelFolder(Path("-"), digest, opponent, 0), rows)


@pytest.fixture
def run(tmp_path):
    """Ten prompts in parts of three."""
    run = RunDir(Storage(tmp_path))
    write_prompts(run.prompts, count=10, part_rows=3)
    return run


def play(job: Job, config: SpinConfig, engine: FakeEngine) -> list[dict[str, Any]]:
    """What the actors of a job would write and the driver would commit, without them."""
    found = find_parts(job, config).whole
    for shard in cut_into_shards(job, config):
        if shard.name not in found:
            found[shard.name] = job.target.write_part(shard.name, generation.answer(shard, config, engine))
    job.target.commit(found, job.inputs(), job.settings(config))
    return rows_of(job.target)


def test_held_out_rows_get_samples_of_their_own_whose_first_is_the_only_one_of_a_run_without(run):
    alone = play(job_of(run), config_for(), FakeEngine())
    several = play(replace(job_of(run), target=run.heldout_samples(0), samples=3), config_for(), FakeEngine())
    assert [row for row in several if row["sample"] == 0] == alone
    assert len(several) == 30


def test_answers_to_read_have_a_distribution_of_their_own(run):
    config, engine = config_for(), FakeEngine()
    reading = config.generation.sampling.model_copy(update={"temperature": 0.5})
    asked = []

    def generate(ids: Any, sampling: Any, seeds: Any, **more: Any) -> list[Completion]:
        asked.append(sampling)
        return FakeEngine().generate(ids, sampling, seeds, **more)

    engine.generate = generate
    job = replace(job_of(run), target=run.examples(0), rows=np.arange(2), samples=1, sampling=reading)
    assert len(play(job, config, engine)) == 2
    assert asked == [reading]
    assert job.settings(config)["sampling"]["temperature"] == 0.5
    assert job_of(run).settings(config)["sampling"]["temperature"] == 1


# Shards


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 23),
    part_rows=st.integers(1, 9),
    shard_rows=st.integers(1, 12),
    samples=st.integers(1, 5),
    wanted=st.none() | st.integers(1, 25),
    iteration=st.integers(0, 6),
)
def test_every_prompt_that_is_played_is_answered_once_per_sample_and_in_order(
    tmp_path_factory, count, part_rows, shard_rows, samples, wanted, iteration
):
    run = RunDir(Storage(tmp_path_factory.mktemp("run")))
    write_prompts(run.prompts, count, part_rows)
    config = config_for(shard_rows, samples)
    rows = prompt_slice(count, wanted, iteration, seed=0)
    job = job_of(run, rows)
    played = list(range(count)) if rows is None else rows.tolist()
    assert row_count(job) == len(played)
    engine = FakeEngine()
    answers = play(job, config, engine)
    assert [(row["prompt_id"], row["sample"]) for row in answers] == [
        (f"p{number:03d}", sample) for number in played for sample in range(samples)
    ]
    assert [prompt for call in engine.calls for prompt in call] == [
        [1, number] for number in played for _ in range(samples)
    ]
    # A shard holds at most shard_rows responses, but at least one prompt; all but the last are full.
    sizes = [len(call) for call in engine.calls]
    full = max(1, shard_rows // samples) * samples
    assert all(size == full for size in sizes[:-1]) and sizes[-1] <= full


def test_shards_cross_the_parts_of_the_prompts(run):
    """Parts of 3 and shards of 4: the second shard has rows 1 and 2 of part 1, and rows 0 and 1 of part 2."""
    shards = cut_into_shards(job_of(run), config_for(shard_rows=4))
    assert [shard.name for shard in shards] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert [(name, rows) for name, _, rows in shards[1].pieces] == [
        ("part-00001.parquet", (1, 2)), ("part-00002.parquet", (0, 1)),
    ]  # fmt: skip


def test_a_damaged_prompt_is_never_played(run):
    shards = cut_into_shards(job_of(run), config_for())
    run.storage.replace("prompts/part-00000.parquet", b"damaged")
    with pytest.raises(RunDirError, match=r"prompts/part-00000\.parquet: differs from its digest"):
        generation.answer(shards[0], config_for(), FakeEngine())


# Answers


def test_answers_are_the_engines_tokens_exactly(run):
    config, engine = config_for(), FakeEngine()
    rows = play(job_of(run), config, engine)
    for row in rows:
        (answer,) = FakeEngine().generate([[0]], config.generation.sampling, [row["seed"]])
        assert (row["token_ids"], row["finish_reason"]) == (answer.token_ids, answer.finish_reason)
    assert {row["opponent"] for row in rows} == {"sft"}


def test_truncated_response_carries_no_eos(run):
    rows = play(job_of(run), config_for(samples=8), FakeEngine())
    assert Counter(row["finish_reason"] for row in rows).keys() == {"stop", "length"}
    for row in rows:
        assert (row["token_ids"][-1] == END_OF_TURN) == (row["finish_reason"] == "stop")
        if row["finish_reason"] == "length":
            assert len(row["token_ids"]) == 6


def test_a_retry_of_a_shard_has_the_same_bytes(run):
    config = config_for()
    shard = cut_into_shards(job_of(run), config)[1]
    first, second = (table_to_bytes(generation.answer(shard, config, FakeEngine())) for _ in range(2))
    assert first == second


# Seeds


def test_a_seed_is_this_number_on_every_machine():
    """A change here makes every resumed run mix two random streams."""
    assert row_seed(0, "sft", "p000", 0) == 1313570721029738864


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**40),
            st.sampled_from(["sft", "iter_000", "iter_001"]),
            st.text("0123456789abcdef", min_size=16, max_size=16),
            st.integers(0, 99),
        ),
        unique=True,
        max_size=30,
    )
)
def test_seeds_are_63_bits_and_differ_whenever_seed_opponent_prompt_or_sample_differ(identities):
    seeds = [row_seed(*identity) for identity in identities]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("part_rows", "shard_rows", "rows"), [(3, 4, None), (10, 2, None), (1, 100, None), (3, 4, np.array([1, 4, 7]))]
)
def test_a_seed_does_not_depend_on_how_the_work_is_cut(tmp_path, part_rows, shard_rows, rows):
    run = RunDir(Storage(tmp_path))
    write_prompts(run.prompts, count=10, part_rows=part_rows)
    for row in play(job_of(run, rows), config_for(shard_rows, samples=2), FakeEngine()):
        assert row["seed"] == row_seed(0, "sft", row["prompt_id"], row["sample"])


# Slices


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 60), wanted=st.integers(1, 60), seed=st.integers(0, 2**64))
def test_slices_are_fresh_until_every_prompt_was_played_and_then_wrap(total, wanted, seed):
    slices = [prompt_slice(total, wanted, iteration, seed) for iteration in range(2 * total)]
    if wanted >= total:
        assert slices == [None] * len(slices)
        return
    played: Counter[int] = Counter()
    for rows in slices:
        assert len(rows) == wanted and (np.diff(rows) > 0).all()  # ascending, hence distinct
        played.update(rows.tolist())
        assert max(played.values()) - min(played.get(row, 0) for row in range(total)) <= 1
    # 2·total slices of ``wanted`` rows are each row 2·wanted times
    assert set(played.values()) == {2 * wanted}


def test_slices_of_the_documentation_wrap_after_three_iterations():
    """10 rows, 4 wanted: places 0-3, 4-7, 8-9 and 0-1 of the order."""
    first, second, third = (set(prompt_slice(10, 4, iteration, seed=0).tolist()) for iteration in range(3))
    assert not first & second
    assert len(third - first - second) == 2 and len(third & first) == 2


def test_all_prompts_are_played_when_nothing_else_is_wanted():
    assert prompt_slice(10, None, 3, seed=0) is None
    assert prompt_slice(10, 10, 3, seed=0) is None


def test_another_seed_plays_in_another_order():
    assert prompt_slice(100, 10, 0, seed=0).tolist() != prompt_slice(100, 10, 0, seed=1).tolist()


# The audit


class TellingEngine(FakeEngine):
    """Tells log p of what it is asked for; every fourth answer is empty."""

    def generate(self, prompt_ids: Any, sampling: Any, seeds: Any, *, audited: int = 0) -> list[Completion]:
        answers = super().generate(prompt_ids, sampling, seeds)
        return [
            replace(
                answer, token_ids=answer.token_ids if number % 4 else [], logp=-number if number < audited else None
            )
            for number, answer in enumerate(answers)
        ]


def audited(run: RunDir) -> list[dict[str, Any]]:
    return table_from_bytes(run.storage.read(run.audit_path(0))).to_pylist()


def test_the_first_shards_first_answers_are_audited_with_their_prompts(run):
    """Four samples each of ten prompts, in shards of 24: of the first 16 answers, every fourth is empty."""
    config, job = config_for(24, samples=4), replace(job_of(run), audit=run.audit_path(0))
    answers = play(job, config, TellingEngine())
    prompts = {row["prompt_id"]: row["prompt_ids"] for table in run.prompts.tables() for row in table.to_pylist()}
    expected = [
        {"prompt_ids": prompts[row["prompt_id"]], "token_ids": row["token_ids"], "engine_logp": -number}
        for number, row in enumerate(answers[:16])
        if number % 4
    ]
    assert audited(run) == expected
    assert len(expected) == 12


def test_the_audit_is_of_the_answers_that_are_there(run):
    """It is written before the shard, and again with it; an engine that tells nothing leaves none."""
    config, job = config_for(), replace(job_of(run), audit=run.audit_path(0))
    first, second, _ = cut_into_shards(job, config)
    assert (first.audit, second.audit) == (run.audit_path(0), None)
    generation.answer(second, config, TellingEngine())
    assert run.storage.find(run.audit_path(0)) is None
    generation.answer(first, config, TellingEngine())
    assert len(audited(run)) == 3
    generation.answer(first, config, FakeEngine())
    assert audited(run) == []


def test_held_out_answers_and_examples_are_not_audited(run):
    assert all(shard.audit is None for shard in cut_into_shards(job_of(run), config_for()))


# Resuming


def test_finished_shards_are_not_done_again(run):
    config, job = config_for(), job_of(run)
    shards = cut_into_shards(job, config)
    for shard in shards[:2]:
        job.target.write_part(shard.name, generation.answer(shard, config, FakeEngine()))
    found = find_parts(job, config).whole
    assert list(found) == ["part-00000.parquet", "part-00001.parquet"]
    assert [entry.rows for entry in found.values()] == [4, 4]
    engine = FakeEngine()
    assert len(play(job, config, engine)) == 10
    assert engine.calls == [[[1, 8], [1, 9]]]


@pytest.mark.parametrize(
    ("changed_job", "changed_config"),
    [
        ({"digest": "d1"}, {}),
        ({"opponent": "iter_000"}, {}),
        ({"rows": np.array([0, 1])}, {}),
        ({}, {"seed": 1}),
        ({}, {"shard_rows": 5}),
        ({}, {"samples": 2}),
        ({}, {"model": {"path": "m", "max_length": 1024}}),
    ],
    ids=["weights", "name", "rows", "seed", "shard_rows", "samples", "max_length"],
)
def test_shards_of_another_opponent_or_of_other_settings_are_refused_by_name(run, changed_job, changed_config):
    config, job = config_for(), job_of(run)
    shard = cut_into_shards(job, config)[0]
    job.target.write_part(shard.name, generation.answer(shard, config, FakeEngine()))
    with pytest.raises(RunDirError, match=r"generations/part-00000\.parquet: was made from other inputs or with"):
        find_parts(job_of(run, **changed_job), config_for(**changed_config))


def test_shards_of_other_prompts_are_refused(run, tmp_path_factory):
    config, job = config_for(), job_of(run)
    shard = cut_into_shards(job, config)[0]
    other = RunDir(Storage(tmp_path_factory.mktemp("other")))
    write_prompts(other.prompts, count=9, part_rows=3)
    other.generations(0).write_part(shard.name, generation.answer(shard, config, FakeEngine()))
    with pytest.raises(RunDirError, match="was made from other inputs or with other settings"):
        find_parts(job_of(other), config)


def test_more_engines_or_memory_do_not_make_finished_shards_another_work(run):
    config, job = config_for(), job_of(run)
    shard = cut_into_shards(job, config)[0]
    job.target.write_part(shard.name, generation.answer(shard, config, FakeEngine()))
    played = config.generation.model_dump() | {"replicas": 4, "engine": {"gpu_memory_utilization": 0.5}}
    assert list(find_parts(job, config_of(generation=played)).whole) == [shard.name]


# An engine that dies


class DyingEngine(FakeEngine):
    """The first ``deaths`` of them die, as when vLLM's own processes are killed."""

    started = 0

    def __init__(self, deaths: int) -> None:
        super().__init__()
        DyingEngine.started += 1
        self._dies = DyingEngine.started <= deaths

    def generate(self, *arguments: Any, audited: int = 0) -> list[Completion]:
        if self._dies:
            raise RuntimeError("Executor failed.")
        return super().generate(*arguments)


def played_by(run: RunDir, config: SpinConfig, deaths: int) -> dict[str, Any]:
    DyingEngine.started = 0
    player = generation._Player(cast(Any, None), config, lambda spec: DyingEngine(deaths))
    return player({"shard": pickle.dumps(cut_into_shards(job_of(run), config)[0])})["finished"]


def test_a_shard_whose_engine_dies_is_answered_the_same_by_a_new_one_and_the_loss_is_told(run, tmp_path) -> None:
    calm = RunDir(Storage(tmp_path / "calm"))
    write_prompts(calm.prompts, count=10, part_rows=3)
    expected, found = played_by(calm, config_for(), 0), played_by(run, config_for(), 2)
    assert (expected["lost"], found["lost"]) == (0, 2)
    assert found["entry"] == expected["entry"]


def test_on_a_gpu_the_process_ends_with_its_engine_and_another_one_does_the_shard(run, monkeypatch) -> None:
    """No second engine starts where CUDA may be broken. The next process, which Ray starts, gives the same shard."""
    monkeypatch.setattr(generation, "_end_process", lambda: sys.exit("ended"))
    config = config_for()
    on_gpu = config.model_copy(
        update={"generation": config.generation.model_copy(update={"resources": ResourcesConfig(gpus=1)})}
    )
    with pytest.raises(SystemExit, match="ended"):
        played_by(run, on_gpu, 1)
    assert DyingEngine.started == 1
    assert played_by(run, on_gpu, 0)["entry"] == played_by(run, config, 0)["entry"]


def test_an_engine_that_always_dies_is_given_up_with_its_own_words(run) -> None:
    config = config_of(generation={"shard_rows": 4, "max_failures": 2})
    with pytest.raises(RuntimeError, match="Executor failed"):
        played_by(run, config, 99)
    assert DyingEngine.started == 3
