"""x, y and y′ side by side; earlier opponents in the window; what is dropped is counted."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import DataError, RunDirError
from spin_ray.loop.algorithms.base import pair_table
from spin_ray.loop.stages import pairs
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import TOKEN_IDS, TRIPLET_SCHEMA
from spin_ray.run_dir.storage import Storage
from tests.support.fakes import config_of, rows_of, write_answers, write_prompts

Answers = list[tuple[str, int, list[int]]]


@pytest.fixture
def run(tmp_path):
    """Seven prompts in parts of three; the real response of prompt i is [10 + i, 2]."""
    run = RunDir(Storage(tmp_path))
    write_prompts(run.prompts, count=7, part_rows=3)
    return run


def config_for(window: int = 2, global_batch_pairs: int = 1) -> SpinConfig:
    return config_of(objective={"window": window}, train={"global_batch_pairs": global_batch_pairs})


def answers_to(*prompts: int, samples: int = 1, first_token: int = 100) -> Answers:
    """Sample s of prompt i is [first_token + i, s, 2]."""
    return [(f"p{i:03d}", sample, [first_token + i, sample, 2]) for i in prompts for sample in range(samples)]


def build(run: RunDir, answers: Answers, shard_rows: int = 2) -> tuple[list[dict[str, Any]], dict[str, int]]:
    write_answers(run.generations(0), answers, shard_rows)
    fresh = pairs.Fresh(pairs.joined(run.prompts, run.generations(0), 0), {}, {})
    entries, counts = pairs.build(fresh, None, run.pairs(0), oldest=-1, algorithm="spin")
    run.pairs(0).commit(entries, {}, {})
    return rows_of(run.pairs(0)), counts


# The join


def test_a_pair_holds_the_tokens_of_prompt_real_and_generated_as_they_were(run):
    rows, _ = build(run, answers_to(0, 1))
    assert rows[1] == {
        "pair_id": "p001/000/0", "prompt_id": "p001", "iteration": 0,
        "prompt_ids": [1, 1], "real_ids": [11, 2], "generated_ids": [101, 0, 2],
    }  # fmt: skip


def test_every_sample_of_a_prompt_makes_a_pair_of_its_own(run):
    rows, counts = build(run, answers_to(0, 4, samples=3), shard_rows=3)
    assert [row["pair_id"] for row in rows] == [f"p{i:03d}/000/{sample}" for i in (0, 4) for sample in range(3)]
    assert {tuple(row["real_ids"]) for row in rows[3:]} == {(14, 2)}
    assert counts["rows"] == 6


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 17), part_rows=st.integers(1, 6), shard_rows=st.integers(1, 6), samples=st.integers(1, 3),
    data=st.data(),
)  # fmt: skip
def test_every_answer_meets_its_own_prompt_however_both_are_cut(
    tmp_path_factory, count, part_rows, shard_rows, samples, data
):
    played = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    run = RunDir(Storage(tmp_path_factory.mktemp("run")))
    write_prompts(run.prompts, count, part_rows)
    rows, counts = build(run, answers_to(*played, samples=samples), shard_rows)
    assert [row["pair_id"] for row in rows] == [f"p{i:03d}/000/{sample}" for i in played for sample in range(samples)]
    for row in rows:
        number = int(row["prompt_id"][1:])
        assert (row["prompt_ids"], row["real_ids"]) == ([1, number], [10 + number, 2])
        assert row["generated_ids"][0] == 100 + number
    assert counts["rows"] == len(rows)


def test_an_answer_to_an_unknown_prompt_is_an_error_that_names_it(run):
    with pytest.raises(DataError, match=r"iter_000/generations: prompt p099 is not in prompts"):
        build(run, [*answers_to(0, 1), ("p099", 0, [5, 2])])


def test_a_damaged_answer_is_not_paired(run):
    write_answers(run.generations(0), answers_to(0, 1), 1)
    run.storage.replace("iter_000/generations/part-00001.parquet", b"damaged")
    with pytest.raises(RunDirError, match=r"part-00001\.parquet: differs from its digest"):
        pairs.run(run, config_for(), 0)


# What is dropped


def test_answers_equal_to_the_real_response_and_empty_ones_are_dropped_and_counted(run):
    """Prompt 1's answer is its real response; prompt 2's is that cut short, which is another; prompt 3's is empty."""
    answers = [("p000", 0, [5, 2]), ("p001", 0, [11, 2]), ("p002", 0, [12]), ("p003", 0, [])]
    rows, counts = build(run, answers)
    assert [row["prompt_id"] for row in rows] == ["p000", "p002"]
    assert counts == {"dropped_identical": 1, "dropped_empty": 1, "from_earlier": 0, "rows": 2}


def test_of_several_samples_only_the_equal_one_is_dropped(run):
    rows, counts = build(run, [("p001", 0, [11, 2]), ("p001", 1, [7, 2]), ("p001", 2, [11, 2])], shard_rows=3)
    assert [row["pair_id"] for row in rows] == ["p001/000/1"]
    assert counts["dropped_identical"] == 2


def test_pairs_of_equal_responses_stay_where_the_recipe_says_so(run):
    """p000's real response is [10, 2]; an empty one is dropped all the same."""
    config = config_of(objective={"window": 1, "keep_identical": True}, train={"global_batch_pairs": 1})
    write_answers(run.generations(0), [("p000", 0, [10, 2]), ("p001", 0, []), ("p002", 0, [5, 2])], 3)
    pairs.run(run, config, 0)
    assert [row["prompt_id"] for row in rows_of(run.pairs(0))] == ["p000", "p002"]
    assert run.pairs(0).manifest().counts["dropped_empty"] == 1


def test_t_spin_keeps_pairs_of_equal_responses_if_the_first_model_said_something_else(run):
    """p000's and p001's responses are [10, 2] and [11, 2]; θ_0 answered p000 otherwise."""
    answers = [("p000", 1, [10, 2]), ("p001", 1, [11, 2])]
    write_answers(run.generations(0), answers, 2)
    (table,) = pairs.joined(run.prompts, run.generations(0), 1)
    triplets = table.append_column(TRIPLET_SCHEMA.field("initial_ids"), pa.array([[5, 2], [11, 2]], TOKEN_IDS))
    fresh = pairs.Fresh([triplets], {}, {})
    _, counts = pairs.build(fresh, None, run.pairs(1), oldest=1, algorithm="tspin")
    assert (counts["rows"], counts["dropped_identical"]) == (1, 1)


def test_two_pairs_of_one_pair_id_are_refused(run):
    """A pair finds its reference by its id: the second would train against the first one's."""
    prompts = next(run.prompts.tables())
    answers = pa.chunked_array([pa.array([[5, 2]] * prompts.num_rows, TOKEN_IDS)])
    config = config_of(algorithm="my_pkg.mine:Mine", train={"global_batch_pairs": 1})

    def make(samples: tuple[int, int]) -> None:
        tables = (pair_table(prompts, 0, answers, sample) for sample in samples)
        pairs.make(run, config, 0, pairs.Fresh(tables, {}, {}))

    with pytest.raises(DataError, match=r"my_pkg\.mine:Mine makes two pairs with the pair_id p000/000/0.*sample"):
        make((0, 0))
    assert not run.pairs(0).is_committed
    make((0, 1))
    ids = [row["pair_id"] for row in rows_of(run.pairs(0))]
    assert ids == [f"p{i:03d}/000/{sample}" for sample in (0, 1) for i in range(3)]


def test_too_few_pairs_are_an_error_that_says_how_many_and_why(run):
    write_answers(run.generations(0), [("p000", 0, [5, 2]), ("p001", 0, [11, 2])], 2)
    with pytest.raises(DataError, match=r"1 pairs are left after dropping 1 with y = y′, fewer than .* 2"):
        pairs.run(run, config_for(global_batch_pairs=2), 0)
    assert not run.pairs(0).is_committed
    assert run.events()[-1]["event"] == "failure"


# The window of earlier opponents


def play(run: RunDir, iterations: int, window: int | str) -> list[list[tuple[int, int]]]:
    """(iteration, first token of y′) of every pair of every iteration; θ_t answers prompt i with 100 (t + 1) + i."""
    found = []
    for iteration in range(iterations):
        write_answers(run.generations(iteration), answers_to(0, 1, first_token=100 * (iteration + 1)), 2)
        pairs.run(run, config_for(window), iteration)
        found.append([(row["iteration"], row["generated_ids"][0]) for row in rows_of(run.pairs(iteration))])
    return found


def test_the_papers_window_mixes_the_pairs_of_this_and_the_last_opponent(run):
    """From iteration 1 on, 100k pairs of 50k prompts."""
    assert play(run, iterations=4, window=2) == [
        [(0, 100), (0, 101)],
        [(1, 200), (1, 201), (0, 100), (0, 101)],
        [(2, 300), (2, 301), (1, 200), (1, 201)],
        [(3, 400), (3, 401), (2, 300), (2, 301)],
    ]


def test_a_window_of_one_has_only_its_own_opponent(run):
    assert play(run, iterations=3, window=1)[2] == [(2, 300), (2, 301)]


def test_a_wide_window_keeps_every_earlier_opponent_once(run):
    found = play(run, iterations=3, window=9)[2]
    assert sorted(found) == [(0, 100), (0, 101), (1, 200), (1, 201), (2, 300), (2, 301)]


def test_fictitious_play_keeps_every_opponent_whatever_their_number(run):
    """``window: all``: after three iterations a third of the pairs is of each."""
    first = [(0, 100), (0, 101)]
    second = [(1, 200), (1, 201), *first]
    assert play(run, iterations=3, window="all") == [first, second, [(2, 300), (2, 301), *second]]


def test_pairs_of_earlier_iterations_keep_their_names_and_are_counted(run):
    play(run, iterations=2, window=2)
    assert [row["pair_id"] for row in rows_of(run.pairs(1))] == ["p000/001/0", "p001/001/0", "p000/000/0", "p001/000/0"]
    assert run.pairs(1).manifest().counts == {
        "dropped_identical": 0, "dropped_empty": 0, "from_earlier": 2, "rows": 4,
    }  # fmt: skip


# Resuming


def test_committed_pairs_are_not_made_again(run):
    write_answers(run.generations(0), answers_to(0, 1), 2)
    pairs.run(run, config_for(), 0)
    events = run.events()
    pairs.run(run, config_for(), 0)
    assert run.events() == events


def test_pairs_of_another_window_are_refused(run):
    write_answers(run.generations(0), answers_to(0, 1), 2)
    pairs.run(run, config_for(window=2), 0)
    with pytest.raises(RunDirError, match="iter_000/pairs: was made with other values of window"):
        pairs.run(run, config_for(window=3), 0)


def test_parts_of_an_attempt_that_was_never_committed_are_replaced(run):
    write_answers(run.generations(0), answers_to(0, 1), 2)
    for name in ("part-00000.parquet", "part-00007.parquet"):
        run.storage.create(f"iter_000/pairs/{name}", b"of a driver that died")
    pairs.run(run, config_for(), 0)
    assert run.pairs(0).part_names() == ["part-00000.parquet"]
    assert len(rows_of(run.pairs(0))) == 2
