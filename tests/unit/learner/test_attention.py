"""Each way to attend against the rule; the rule itself: test_packing.py."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from spin_ray.learner.attention import ATTENTIONS, capability, flex, varlen
from spin_ray.learner.attention.rule import key_ranges, visible
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.packing import build_pack
from tests.support.learner_cases import batches_of, random_rows, table_of

CPU = torch.device("cpu")
WINDOWS = [None, 1, 3, 40]


@pytest.fixture(scope="module")
def long_pack() -> PackedBatch:
    """A pack of six blocks: trees that begin in the middle of blocks, a response of whole blocks, padding."""
    rng = np.random.default_rng(0)
    rows = [
        tuple(rng.integers(1, 60, length).tolist() for length in lengths)
        for lengths in [(5, 3, 7), (30, 40, 10), (140, 390, 1), (1, 1, 100)]
    ]
    return build_pack(((0,), (1,), (2,), (3,)), table_of(rows), pack_length=760, pad_id=0)  # type: ignore[arg-type]


def packs() -> Iterator[PackedBatch]:
    for seed in range(3):
        yield from batches_of(random_rows(seed, trees=5, samples=3))
    yield build_pack((), table_of(random_rows(0, 1)), pack_length=16, pad_id=0)


@pytest.mark.parametrize("window", WINDOWS)
def test_ranges_of_keys_are_the_rule(window: int | None) -> None:
    for batch in packs():
        places = torch.arange(len(batch.tree))
        found = torch.zeros(len(places), len(places), dtype=torch.bool)
        for start, stop in zip(*map(torch.from_numpy, key_ranges(batch, window)), strict=True):
            found |= (places >= start[:, None]) & (places < stop[:, None])
        assert torch.equal(found, visible(batch, window))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_counts_positions_of_the_sequence(window: int | None) -> None:
    """A query sees the last ``window`` tokens of its prompt and response, itself included."""
    for batch in packs():
        for place, seen in enumerate(visible(batch, window)):
            position = int(batch.position_ids[place])
            expected = range(max(0, position + 1 - (window or 10**6)), position + 1)
            if batch.tree[place] >= 0:
                assert sorted(batch.position_ids[seen].tolist()) == list(expected)


@pytest.mark.parametrize("window", [None, 100])
def test_the_block_mask_of_the_host_is_that_of_torch(long_pack: PackedBatch, window: int | None) -> None:
    length = len(long_pack.tree)
    found = flex.block_mask(long_pack, window, CPU)
    mask_mod = flex.mask_mod(long_pack, window)
    expected = create_block_mask(mask_mod, None, None, length, length, device="cpu")
    assert found.shape == expected.shape
    assert torch.equal(found.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for count, places in [("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")]:
        assert used(found, count, places) == used(expected, count, places)
    assert window or found.full_kv_num_blocks.any()
    places = torch.arange(length)
    every = mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places[None, :])
    assert torch.equal(every, visible(long_pack, window))


def used(mask: BlockMask, count: str, places: str) -> list[list[int]]:
    counts, rows = getattr(mask, count)[0, 0].tolist(), getattr(mask, places)[0, 0].tolist()
    return [row[:number] for number, row in zip(counts, rows, strict=True)]


def by_softmax(
    query: Tensor, keys: Tensor, values: Tensor, query_stops: Tensor, key_stops: Tensor, longest_query: int,
    longest_key: int, *, scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Stands in for ``varlen_attn``: its documented mask (causal from the bottom right), sequence by sequence."""
    outputs = []
    for i in range(len(query_stops) - 1):
        q = query[query_stops[i] : query_stops[i + 1]]
        k, v = (x[key_stops[i] : key_stops[i + 1]].repeat_interleave(2, dim=1) for x in (keys, values))
        assert len(q) <= longest_query and len(k) <= longest_key
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))[None, :]
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        scores = torch.einsum("qhw,khw->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khw->qhw", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def states_of(batch: PackedBatch) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, len(batch.tree), 16, dtype=torch.float64) for heads in (4, 2, 2)]


def attend(way: Any, batch: PackedBatch, states: list[Tensor], window: int | None, **settings: Any) -> Tensor:
    """Returns what tokens that are no padding attend to."""
    plan = way.prepare(batch, [window], CPU, states[0].dtype)
    settings = {"scaling": 0.3, "softcap": None, "sinks": None, **settings}
    return plan.attend(*states, window=window, **settings)[0, batch.tree >= 0]


@pytest.mark.parametrize("window", WINDOWS)
def test_varlen_attends_by_the_rule_forward_and_backward(long_pack: PackedBatch, window: int | None) -> None:
    """In fp64, with torch's kernel replaced by its documentation."""
    found = []
    for way in (varlen.Varlen(by_softmax), ATTENTIONS["dense"]):
        states = [state.requires_grad_() for state in states_of(long_pack)]
        output = attend(way, long_pack, states, window)
        (output * torch.arange(16)).sum().backward()
        found.append([output, *(state.grad for state in states)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (40, 1.5)])
def test_flex_and_trees_attend_by_the_rule(long_pack: PackedBatch, window: int | None, softcap: float | None) -> None:
    """FlexAttention runs on CPUs without a backward pass only; there it is the same code, not compiled."""
    states = [state.float() for state in states_of(long_pack)]
    expected = attend(ATTENTIONS["dense"], long_pack, states, window, softcap=softcap)
    for name in ("flex", "trees"):
        found = attend(ATTENTIONS[name], long_pack, states, window, softcap=softcap)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_flex_has_a_graph_for_each_kind_of_layer_and_takes_no_number_as_a_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled for any number, dynamo makes a float of a layer a tensor on the CPU, which kernels of a card refuse."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex.flex_attention, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_kernel", lambda _: compiled)
    for length in (640, 760, 1000):
        for batch in batches_of(random_rows(0, trees=5, samples=3), pack_length=length):
            states = [state.float() for state in states_of(batch)]
            for softcap in (None, 1.5):
                attend(ATTENTIONS["flex"], batch, states, 9, softcap=softcap)
    assert counter.frame_count == 2
    kernels = [node for graph in counter.graphs for node in graph.graph.nodes if node.name.startswith("flex_attention")]
    captured = [tensor for kernel in kernels for tensor in kernel.args[-2]]
    assert [tensor.meta["example_value"].dtype for tensor in captured] == [torch.float32]


def test_varlen_refuses_what_its_kernel_would_ignore(long_pack: PackedBatch) -> None:
    for settings in ({"softcap": 50.0}, {"sinks": torch.zeros(4)}):
        with pytest.raises(NotImplementedError, match="attention varlen cannot compute"):
            attend(varlen.Varlen(by_softmax), long_pack, states_of(long_pack), None, **settings)


def test_reasons_against_a_way_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert ATTENTIONS["varlen"].why_not(cuda, torch.float32) == "varlen_attn computes in bf16 or fp16, not in float32"
    monkeypatch.setattr(flex, "find_spec", lambda name: name)
    monkeypatch.setattr(flex, "missing_tools", lambda: "Python.h")
    assert ATTENTIONS["flex"].why_not(cuda, torch.bfloat16) == "FlexAttention needs Python.h"
    assert "is for CPUs" in str(ATTENTIONS["trees"].why_not(cuda, torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(capability, "_card", lambda _: "Tesla T4")
    reason = ATTENTIONS["varlen"].why_not(cuda, torch.bfloat16)
    assert reason == "varlen_attn needs compute capability 8.0, and Tesla T4 has 7.5"


@pytest.mark.parametrize(
    ("width", "kibibytes", "dtype", "smaller"),
    [
        (128, 99, torch.bfloat16, set()),
        (192, 99, torch.bfloat16, {"bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2", "bwd_num_stages"}),
        (256, 99, torch.bfloat16, {"bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2", "bwd_num_stages"}),
        (512, 99, torch.bfloat16, {"fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_stages"}),
        (256, 99, torch.float32, set()),
        (256, 163, torch.bfloat16, set()),
    ],
)
def test_wide_heads_have_smaller_tiles_where_shared_memory_is_small(
    monkeypatch: pytest.MonkeyPatch, width: int, kibibytes: int, dtype: torch.dtype, smaller: set[str]
) -> None:
    """Which tiles fit is tried by tests/null_card, with Triton's compiler."""
    monkeypatch.setattr(flex, "shared_memory", lambda device: kibibytes * 1024)
    query: Any = SimpleNamespace(shape=(1, 2, 8, width), itemsize=dtype.itemsize, device=torch.device("cuda"))
    assert flex.kernel_options(query).keys() - {"FORCE_USE_FLEX_ATTENTION"} == smaller
