"""Planning and packing: every pair once, nothing overfull, no response in sight of another."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.learner import step as loop
from spin_ray.learner.attention.rule import visible
from spin_ray.learner.packing import PairLengths, Step, build_pack, plan_epoch
from tests.support.learner_cases import Row, lengths_of, random_rows, table_of

torch.set_num_threads(1)
PACK_LENGTH = 32


@st.composite
def pair_rows(draw: st.DrawFn) -> list[Row]:
    """Up to 12 prompts, each with up to 4 responses y' in shuffled order; every token of the table is unique."""
    rows: list[Row] = []
    ids = iter(range(1, 10_000))

    def tokens(low: int, high: int) -> list[int]:
        return [next(ids) for _ in range(draw(st.integers(low, high)))]

    for _ in range(draw(st.integers(1, 12))):
        prompt, real = tokens(1, 10), tokens(1, 10)
        rows += [(prompt, real, tokens(0, 12)) for _ in range(draw(st.integers(1, 4)))]
    return draw(st.permutations(rows))


def plan(rows: list[Row], batch: int = 3, seed: int = 0, epoch: int = 0, ranks: int = 1) -> list[Step]:
    return plan_epoch(
        lengths_of(rows), pack_length=PACK_LENGTH, global_batch_pairs=batch, seed=seed, epoch=epoch, ranks=ranks
    )


@given(pair_rows(), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_pair_is_trained_on_exactly_once_per_epoch(rows: list[Row], batch: int, ranks: int) -> None:
    steps = plan(rows, batch, ranks=ranks)
    planned = [row for step in steps for pack in step.packs for tree in pack for row in tree]
    assert sorted(planned) == list(range(len(rows)))
    assert sum(step.num_pairs for step in steps) == len(rows)
    assert sum(step.num_real_tokens for step in steps) == sum(len(real) for _, real, _ in rows)


@given(pair_rows(), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_no_pack_is_overfull_and_no_step_exceeds_the_batch_but_by_a_single_tree(
    rows: list[Row], batch: int, ranks: int
) -> None:
    for step in plan(rows, batch, ranks=ranks):
        trees = [tree for pack in step.packs for tree in pack]
        assert step.num_pairs == sum(map(len, trees))
        assert step.num_pairs <= batch or len(trees) == 1
        for pack in step.packs:
            sizes = [
                len(rows[tree[0]][0]) + len(rows[tree[0]][1]) + sum(len(rows[row][2]) for row in tree) for tree in pack
            ]
            assert 0 < sum(sizes) <= PACK_LENGTH


@given(pair_rows(), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_ranks_get_equal_numbers_of_packs_and_together_all_of_them(rows: list[Row], world_size: int) -> None:
    for step in plan(rows, batch=8, ranks=world_size):
        shares = [step.for_rank(rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) == -(-len(step.packs) // world_size)
        assert sorted(pack for share in shares for pack in share if pack) == sorted(step.packs)


@given(pair_rows(), st.integers(1, 8), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_ranks_change_neither_the_rows_of_a_step_nor_what_its_losses_are_divided_by(
    rows: list[Row], batch: int, ranks: int
) -> None:
    def without_packs(step: Step) -> tuple[list[tuple[int, ...]], int, int]:
        return sorted(tree for pack in step.packs for tree in pack), step.num_pairs, step.num_real_tokens

    alone, together = plan(rows, batch), plan(rows, batch, ranks=ranks)
    assert [without_packs(step) for step in together] == [without_packs(step) for step in alone]


def test_several_ranks_are_at_work_all_the_time() -> None:
    """Lengths like the paper's, 64 pairs of about 640 tokens in a step: full packs would be ten or eleven, and six or
    five of eight ranks would wait for the others' second. A rank computes as long as the longest pack of each round.
    """
    rng = np.random.default_rng(0)
    prompt, real, generated = (
        np.minimum(np.ceil(rng.lognormal(np.log(mean) - 0.18, 0.6, 64 * 40)), 1300).astype(int)
        for mean in (130, 256, 256)
    )
    lengths = PairLengths(prompt=prompt, real=real, generated=generated, tree_key=np.arange(len(prompt)))

    def waited(ranks: int, spread: bool) -> float:
        """Of the tokens that ``ranks`` could have computed meanwhile, the share that they did not."""
        computed = time = 0
        for step in plan_epoch(
            lengths, pack_length=4096, global_batch_pairs=64, seed=0, epoch=0, ranks=ranks if spread else 1
        ):
            tokens = [
                int((prompt + real + generated)[[row for tree in pack for row in tree]].sum()) for pack in step.packs
            ]
            computed += sum(tokens)
            time += sum(max(tokens[start : start + ranks]) for start in range(0, len(tokens), ranks))
        return 1 - computed / (time * ranks)

    assert waited(8, spread=False) > 0.3 and waited(8, spread=True) < 0.03
    assert waited(3, spread=True) < 0.03


@given(pair_rows(), st.integers(-3, 2**40), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_plan_depends_on_nothing_but_its_arguments(rows: list[Row], seed: int, epoch: int) -> None:
    assert plan(rows, seed=seed, epoch=epoch) == plan(rows, seed=seed, epoch=epoch)


def test_epochs_and_seeds_shuffle_differently() -> None:
    rows = random_rows(0, trees=40)
    plans = [plan(rows, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(plans[i] != plans[j] for i in range(4) for j in range(i))


@given(pair_rows())
@settings(max_examples=30, deadline=None)
def test_a_response_token_sees_its_prompt_and_itself_and_no_other_token(rows: list[Row]) -> None:
    """Token ids are unique, so what a query sees, read off as ids, must be the sequence prompt + response up to it."""
    table = table_of(rows)
    for pack in (pack for step in plan(rows, batch=8) for pack in step.packs):
        batch = build_pack(pack, table, pack_length=PACK_LENGTH, pad_id=0)
        seen = visible(batch)
        sequence_of_last = {
            (prompt + response)[i]: (prompt + response)[: i + 1]
            for prompt, real, generated in rows
            for response in (real, generated)
            for i in range(len(prompt + response))
        }
        for place, token in enumerate(batch.input_ids.tolist()):
            if batch.tree[place] < 0:
                assert seen[place].nonzero().tolist() == [[place]]
            else:
                sequence = sequence_of_last[token]
                assert batch.input_ids[seen[place]].tolist() == sequence
                assert batch.position_ids[place] == len(sequence) - 1


@given(pair_rows())
@settings(max_examples=30, deadline=None)
def test_targets_are_all_response_tokens_predicted_from_the_token_before(rows: list[Row]) -> None:
    table = table_of(rows)
    for pack in (pack for step in plan(rows, batch=8) for pack in step.packs):
        batch = build_pack(pack, table, pack_length=PACK_LENGTH, pad_id=0)
        for real, generated, row in zip(
            batch.real_segment, batch.generated_segment, batch.pair_row.tolist(), strict=True
        ):
            prompt = rows[row][0]
            for segment, response in ((real, rows[row][1]), (generated, rows[row][2])):
                mine = batch.segment == segment
                assert batch.target_ids[mine].tolist() == response
                before = batch.input_ids[batch.predict_at[mine]].tolist()
                assert before == (prompt[-1:] + response)[:-1]
            assert (generated < 0) == (not rows[row][2])
        assert sorted(batch.pair_row.tolist()) == sorted(row for tree in pack for row in tree)


def test_pack_of_the_type_documentation() -> None:
    """The example of ``PackedBatch``: prompt [5, 6], real [7, 2], generated [8], pack length 6."""
    batch = build_pack(((0,),), table_of([([5, 6], [7, 2], [8])]), pack_length=6, pad_id=0)
    found = {name: getattr(batch, name) for name in batch.__slots__}
    assert {name: value.tolist() for name, value in found.items() if isinstance(value, torch.Tensor)} == {
        "input_ids": [5, 6, 7, 2, 8, 0],
        "position_ids": [0, 1, 2, 3, 2, 0],
        "tree": [0, 0, 0, 0, 0, -1],
        "branch": [0, 0, 1, 1, 2, 0],
        "predict_at": [1, 2, 1],
        "target_ids": [7, 2, 8],
        "segment": [0, 0, 1],
        "real_segment": [0],
        "generated_segment": [1],
        "pair_row": [0],
    }
    assert (batch.num_segments, len(batch.pair_row), batch.num_useful_tokens) == (2, 1, 5)


def test_padding_is_known_by_length_even_where_the_pad_id_is_the_end_of_turn_id() -> None:
    batch = build_pack(((0,),), table_of([([5, 2], [7, 2], [2])]), pack_length=8, pad_id=2)
    assert batch.tree.tolist() == [0, 0, 0, 0, 0, -1, -1, -1]
    assert batch.target_ids.tolist() == [7, 2, 2]


def test_samples_of_one_prompt_share_its_tree_and_its_real_response() -> None:
    """2 + 2 + 1 + 2 tokens: the prompt and y once, two y'."""
    rows: list[Row] = [([5, 6], [7, 2], [8]), ([5, 6], [7, 2], [9, 2])]
    ((pack,),) = [step.packs for step in plan(rows)]
    batch = build_pack(pack, table_of(rows), pack_length=8, pad_id=0)
    assert batch.input_ids.tolist() == [5, 6, 7, 2, 8, 9, 2, 0]
    assert (batch.real_segment.tolist(), batch.generated_segment.tolist()) == ([0, 0], [1, 2])


def test_equal_responses_to_a_prompt_are_one_branch_so_that_their_margin_is_exactly_0() -> None:
    """y′ = y, and a sample that came twice; the same tokens under another prompt are others."""
    rows: list[Row] = [([5, 6], [7, 2], [7, 2]), ([5, 6], [7, 2], [9, 2]), ([5, 6], [7, 2], [9, 2]), ([4], [3], [9, 2])]
    batch = build_pack(((0, 1, 2), (3,)), table_of(rows), pack_length=12, pad_id=0)
    assert batch.input_ids.tolist() == [5, 6, 7, 2, 9, 2, 4, 3, 9, 2, 0, 0]
    assert (batch.real_segment.tolist(), batch.generated_segment.tolist()) == ([0, 0, 0, 2], [0, 1, 1, 3])
    assert batch.branch.tolist()[:10] == [0, 0, 1, 1, 2, 2, 0, 1, 2, 2]


def test_a_key_whose_samples_do_not_fit_together_becomes_several_trees() -> None:
    """Stem 4, five y' of 10 tokens: 4 + 10 + 10 fits 32, a third does not; so 2 + 2 + 1 samples."""
    rows: list[Row] = [([1, 2], [3, 4], list(range(10 * i, 10 * i + 10))) for i in range(1, 6)]
    trees = sorted(len(tree) for step in plan(rows, batch=5) for pack in step.packs for tree in pack)
    assert trees == [1, 2, 2]


def test_empty_pack_is_all_padding_and_has_no_targets() -> None:
    batch = build_pack((), table_of([([5], [7], [8])]), pack_length=4, pad_id=9)
    assert batch.input_ids.tolist() == [9] * 4
    assert batch.tree.tolist() == [-1] * 4
    assert (len(batch.target_ids), batch.num_segments, len(batch.pair_row), batch.num_useful_tokens) == (0, 0, 0, 0)


def test_chunking_of_the_table_does_not_matter() -> None:
    rows = random_rows(3, trees=6)
    whole = table_of(rows)
    chunked = pa.concat_tables([whole.slice(i, 2) for i in range(0, len(rows), 2)])
    for pack in (pack for step in plan(rows) for pack in step.packs):
        one, other = (build_pack(pack, table, pack_length=PACK_LENGTH, pad_id=0) for table in (whole, chunked))
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.target_ids, other.target_ids)


def test_packs_are_close_to_full() -> None:
    """Trees of 60-1600 tokens, 64 to a step of about 13 packs: within 4 % of the fewest packs for so many tokens."""
    rng = np.random.default_rng(0)
    n = 6400
    prompt, real, generated = (rng.integers(20, high, n) for high in (400, 600, 600))
    lengths = PairLengths(prompt=prompt, real=real, generated=generated, tree_key=np.arange(n))
    steps = plan_epoch(lengths, pack_length=4096, global_batch_pairs=64, seed=0, epoch=0)
    tokens = prompt + real + generated
    least = sum(-(-int(sum(tokens[row] for p in step.packs for tree in p for row in tree)) // 4096) for step in steps)
    assert len(steps) == 100
    assert sum(len(step.packs) for step in steps) <= 1.04 * least


def test_a_row_that_cannot_fit_is_an_error_that_names_it() -> None:
    rows: list[Row] = [([1], [2], [3]), ([1] * 20, [2] * 9, [3] * 4)]
    with pytest.raises(ValueError, match=r"row 1 \(prompt 20, real 9, generated 4 tokens\).*pack of 32"):
        plan(rows)


def test_a_row_without_prompt_or_real_response_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"row 1 .*at least one token"):
        plan([([1], [2], [3]), ([], [2], [3])])


def test_equal_keys_with_different_prompts_are_an_error() -> None:
    lengths = PairLengths(
        prompt=np.array([3, 4]), real=np.array([2, 2]), generated=np.array([1, 1]), tree_key=np.array([7, 7])
    )
    with pytest.raises(ValueError, match="row 1: shares tree_key 7"):
        plan_epoch(lengths, pack_length=32, global_batch_pairs=2, seed=0, epoch=0)


def with_prompt_ids(rows: list[Row], prompt_ids: list[str]) -> pa.Table:
    return table_of(rows).append_column("prompt_id", pa.array(prompt_ids))


@pytest.mark.parametrize("other", [[8, 4], [8]], ids=["as long", "shorter"])
def test_rows_of_one_prompt_with_other_real_responses_are_other_trees(other: list[int]) -> None:
    """Each row is packed with its own y, and rows with the same y share it."""
    rows: list[Row] = [([1, 2], [7, 3], [5]), ([1, 2], other, [6]), ([1, 2], [7, 3], [9]), ([1, 4], [7, 3], [5])]
    table = with_prompt_ids(rows, ["a"] * 4)
    lengths = loop.pair_lengths([table.slice(0, 1), table.slice(1)])
    assert lengths.tree_key.tolist() == [0, 1, 0, 2]
    (step,) = plan_epoch(lengths, pack_length=PACK_LENGTH, global_batch_pairs=4, seed=0, epoch=0)
    seen = {}
    for pack in step.packs:
        batch = build_pack(pack, table, pack_length=PACK_LENGTH, pad_id=0)
        for row, real in zip(batch.pair_row.tolist(), batch.real_segment.tolist(), strict=True):
            seen[row] = batch.target_ids[batch.segment == real].tolist()
    assert seen == {row: real for row, (_, real, _) in enumerate(rows)}


@given(pair_rows())
@settings(max_examples=20, deadline=None)
def test_where_a_prompt_has_one_real_response_trees_are_those_of_its_id(rows: list[Row]) -> None:
    """So the plan of such rows is what it was when the id alone was the key."""
    ids = [str(real) for _, real, _ in rows]
    table = with_prompt_ids(rows, ids)
    by_id = table["prompt_id"].combine_chunks().dictionary_encode().indices
    assert loop.pair_lengths([table]).tree_key.tolist() == by_id.to_pylist()


def test_no_rows_make_no_steps() -> None:
    nothing = np.array([], dtype=np.int64)
    lengths = PairLengths(prompt=nothing, real=nothing, generated=nothing, tree_key=nothing)
    assert plan_epoch(lengths, pack_length=32, global_batch_pairs=2, seed=0, epoch=0) == []


@pytest.mark.parametrize(
    ("prompt", "response", "batch", "pack_length"),
    [
        pytest.param((30, 75), (9, 20), 24, 512, id="one equation as the answer"),
        pytest.param((60, 180), (60, 220), 16, 1024, id="a worked solution as the answer"),
    ],
)
def test_training_computes_hardly_more_than_each_prompt_and_each_response_once(prompt, response, batch, pack_length):
    """Tokens computed, padding included, are at most 1.05 times those there are, at lengths like the real data's."""
    rng = np.random.default_rng(0)

    def ids(bounds: tuple[int, int]) -> list[int]:
        return [1] * int(rng.integers(*bounds))

    rows = [(ids(prompt), ids(response), ids(response)) for _ in range(480)]
    table = table_of(rows).append_column("prompt_id", pa.array([str(number) for number in range(len(rows))]))
    shape = loop.PackShape(pack_length=pack_length, global_batch_pairs=batch, pad_id=0)
    (steps,) = loop.plan(loop.pair_lengths([table]), shape, epochs=1, seed=0)
    lengths = [len(shape.build(pack, table).input_ids) for step in steps for pack in step.packs]
    assert sum(lengths) <= 1.05 * sum(len(tokens) for row in rows for tokens in row)
    assert len(set(lengths)) <= 16


def test_a_pack_is_filled_up_to_the_next_multiple_and_never_past_its_length() -> None:
    table = table_of([([1] * 5, [2] * 5, [3] * 5)])
    for multiple, length in [(4, 16), (15, 15), (16, 16), (17, 17), (None, 18)]:
        batch = build_pack(((0,),), table, pack_length=18, pad_id=0, pad_multiple=multiple)
        assert len(batch.input_ids) == length
    assert len(build_pack((), table, pack_length=18, pad_id=0, pad_multiple=4).input_ids) == 4
