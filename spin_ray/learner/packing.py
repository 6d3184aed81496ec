"""The training plan: the pairs of each optimizer step and pack.

    rows ──same prompt and y──> trees ──shuffled──> steps ──best fit──> packs ──tokens──> PackedBatch

The plan depends on its arguments alone, so all ranks and restarted jobs agree.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from heapq import heapreplace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch

from spin_ray.learner.batch import PackedBatch, Run

Tree = tuple[int, ...]
"""Rows with the same prompt and y, packed as prompt, y and every y'."""
Pack = tuple[Tree, ...]
"""Trees of one pack; empty packs ``()`` give all ranks equally many packs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLengths:
    prompt: np.ndarray
    real: np.ndarray
    generated: np.ndarray
    """0 without y' (SFT); includes the tokens of y_0 (T-SPIN)."""
    tree_key: np.ndarray
    """Integer, equal for rows with identical prompt and y, as ``response_names`` says."""

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    packs: tuple[Pack, ...]
    num_pairs: int
    num_real_tokens: int
    """Tokens of y; a shared y counts once per pair."""

    def for_rank(self, rank: int, world_size: int) -> tuple[Pack, ...]:
        """Returns this rank's packs; all ranks get equally many."""
        mine = self.packs[rank::world_size]
        share = -(-len(self.packs) // world_size)
        return mine + ((),) * (share - len(mine))


def response_names(ids: Iterable[str], prompts: pa.ChunkedArray, responses: pa.ChunkedArray) -> Iterator[str]:
    """Yields a name of each response: equal if id, prompt and response are.

    Args:
        ids: ids of the prompts, or of the pairs.
        prompts: tokens of each prompt.
        responses: tokens of each response.
    """
    for name, prompt, response in zip(ids, _token_bytes(prompts), _token_bytes(responses), strict=True):
        yield blake2b(b"%s\0%d\0%s%s" % (name.encode(), len(prompt), prompt, response), digest_size=16).hexdigest()


def _token_bytes(column: pa.ChunkedArray) -> Iterator[bytes]:
    for chunk in column.chunks:
        values = chunk.values.to_numpy()
        for start, stop in pairwise(chunk.offsets.to_pylist()):
            yield values[start:stop].tobytes()


def plan_epoch(
    lengths: PairLengths, *, pack_length: int, global_batch_pairs: int, seed: int, epoch: int, ranks: int = 1
) -> list[Step]:
    """Divides all rows into optimizer steps and packs.

    A step has at most ``global_batch_pairs`` pairs, unless one tree has more.

    Raises:
        ValueError: a row lacks a prompt or y, fits no pack, or differs in length from its tree.
    """
    _check(lengths, pack_length)
    trees, sizes = _trees(lengths, pack_length)
    rng = np.random.default_rng([seed % 2**64, epoch])
    order = rng.permutation(len(trees)).tolist()
    steps = []
    for chosen in _cut(order, trees, global_batch_pairs):
        rows = [row for tree in chosen for row in trees[tree]]
        steps.append(
            Step(
                packs=_packs([trees[tree] for tree in chosen], [sizes[tree] for tree in chosen], pack_length, ranks),
                num_pairs=len(rows),
                num_real_tokens=int(lengths.real[rows].sum()),
            )
        )
    return steps


def _check(lengths: PairLengths, pack_length: int) -> None:
    def first(bad: np.ndarray) -> str | None:
        if not bad.any():
            return None
        row = int(bad.argmax())
        return (
            f"row {row} (prompt {lengths.prompt[row]}, real {lengths.real[row]}, "
            f"generated {lengths.generated[row]} tokens)"
        )

    if name := first((lengths.prompt < 1) | (lengths.real < 1) | (lengths.generated < 0)):
        raise ValueError(f"{name}: prompt and real response must have at least one token each")
    if name := first(lengths.prompt + lengths.real + lengths.generated > pack_length):
        raise ValueError(f"{name} does not fit a pack of {pack_length} tokens; raise pack_length")


def _trees(lengths: PairLengths, pack_length: int) -> tuple[list[Tree], list[int]]:
    order = np.argsort(lengths.tree_key, kind="stable")
    key = lengths.tree_key[order]
    starts = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])[: len(order)]
    stem = (lengths.prompt + lengths.real)[order]
    generated = lengths.generated[order]
    stem_of_tree = np.repeat(stem[starts], np.diff(np.r_[starts, len(order)]))
    if (mismatch := stem != stem_of_tree).any():
        row, key_of_row = order[mismatch.argmax()], key[mismatch.argmax()]
        raise ValueError(
            f"row {row}: shares tree_key {key_of_row} with a row whose prompt or real response is longer or shorter"
        )
    trees: list[Tree] = []
    sizes: list[int] = []
    rows, stems, branches = order.tolist(), stem.tolist(), generated.tolist()
    bounds = [*starts.tolist(), len(rows)]
    for start, stop in pairwise(bounds):
        size, first = stems[start], start
        for i in range(start, stop):
            if size + branches[i] > pack_length:  # the rows of one key become several trees
                trees.append(tuple(rows[first:i]))
                sizes.append(size)
                size, first = stems[start], i
            size += branches[i]
        trees.append(tuple(rows[first:stop]))
        sizes.append(size)
    return trees, sizes


def _cut(order: list[int], trees: list[Tree], global_batch_pairs: int) -> Iterator[list[int]]:
    chosen: list[int] = []
    pairs = 0
    for tree in order:
        if chosen and pairs + len(trees[tree]) > global_batch_pairs:
            yield chosen
            chosen, pairs = [], 0
        chosen.append(tree)
        pairs += len(trees[tree])
    if chosen:
        yield chosen


def _packs(trees: list[Tree], sizes: list[int], pack_length: int, ranks: int) -> tuple[Pack, ...]:
    """Makes few packs for one rank, packs of similar length (if they fit) for several."""
    few = _best_fit_decreasing(trees, sizes, pack_length)
    if ranks == 1:
        return few
    rounds = -(-len(few) // ranks)
    return _spread_evenly(trees, sizes, min(rounds * ranks, len(trees)), pack_length) or few


def _spread_evenly(trees: list[Tree], sizes: list[int], count: int, pack_length: int) -> tuple[Pack, ...] | None:
    """Puts each tree, largest first, into the emptiest pack; returns None if one does not fit.

    Longest packs come first, so that ranks compute packs of similar length together.
    """
    packs: list[list[Tree]] = [[] for _ in range(count)]
    used = [(0, number) for number in range(count)]  # a heap
    for i in sorted(range(len(trees)), key=lambda i: -sizes[i]):
        tokens, pack = used[0]
        if tokens + sizes[i] > pack_length:
            return None
        packs[pack].append(trees[i])
        heapreplace(used, (tokens + sizes[i], pack))
    return tuple(tuple(packs[pack]) for _, pack in sorted(used, reverse=True))


def _best_fit_decreasing(trees: list[Tree], sizes: list[int], pack_length: int) -> tuple[Pack, ...]:
    packs: list[list[Tree]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for i in sorted(range(len(trees)), key=lambda i: -sizes[i]):
        at = bisect_left(room, (sizes[i], -1))
        if at == len(room):
            packs.append([])
            free, pack = pack_length, len(packs) - 1
        else:
            free, pack = room.pop(at)
        packs[pack].append(trees[i])
        insort(room, (free - sizes[i], pack))
    return tuple(tuple(pack) for pack in packs)


def build_pack(
    pack: Pack, table: pa.Table, *, pack_length: int, pad_id: int, pad_multiple: int | None = None
) -> PackedBatch:
    """Builds one pack of PAIR_SCHEMA or TRIPLET_SCHEMA rows, targets and segments in pack order.

    Equal responses to a prompt are one branch and one segment, so that the margin of y′ = y is exactly 0. Padding fills
    up to ``pack_length``, or to a multiple of ``pad_multiple`` if that is less.
    Do not combine the table's chunks: one list array cannot hold 2^31 tokens.
    """
    columns = [table.column(name) for name in ("prompt_ids", "real_ids", "generated_ids")]
    initial = table.column("initial_ids") if "initial_ids" in table.column_names else None
    builder = _PackBuilder()
    for number, tree in enumerate(pack):
        prompt, real = (_tokens(column, tree[0]) for column in columns[:2])
        builder.begin_tree(prompt, number)
        real_segment = builder.add_response(real)
        for row in tree:
            generated = _tokens(columns[2], row)
            builder.pairs.append((real_segment, builder.add_response(generated) if len(generated) else -1, row))
            if initial is not None:
                builder.initial.append(builder.add_response(_tokens(initial, row)))
    multiple = pad_multiple or pack_length
    length = max(-(-builder.length // multiple), 1) * multiple
    return builder.finish(min(length, pack_length), pad_id, with_initial=initial is not None)


def _tokens(column: pa.ChunkedArray, row: int) -> np.ndarray:
    return column[row].values.to_numpy()


class _PackBuilder:
    def __init__(self) -> None:
        self.length = 0
        self.spans: list[tuple[np.ndarray, int, int, int]] = []  # tokens, first position, tree, branch
        self.targets: list[tuple[np.ndarray, np.ndarray]] = []  # predict_at, target_ids; one entry a segment
        self.pairs: list[tuple[int, int, int]] = []
        self.initial: list[int] = []  # segments

    def begin_tree(self, prompt: np.ndarray, number: int) -> None:
        self.spans.append((prompt, 0, number, 0))
        self.length += len(prompt)
        self._tree, self._prompt, self._prompt_end = number, len(prompt), self.length
        self._segments: dict[bytes, int] = {}

    def add_response(self, tokens: np.ndarray) -> int:
        """Returns the response's segment: that of an equal one of the tree, if there is one."""
        if (segment := self._segments.get(tokens.tobytes())) is not None:
            return segment
        segment = self._segments[tokens.tobytes()] = len(self.targets)
        self.spans.append((tokens, self._prompt, self._tree, len(self._segments)))
        predict_at = np.arange(self.length - 1, self.length + len(tokens) - 1)
        predict_at[0] = self._prompt_end - 1
        self.targets.append((predict_at, tokens))
        self.length += len(tokens)
        return segment

    def finish(self, pack_length: int, pad_id: int, *, with_initial: bool) -> PackedBatch:
        if self.length > pack_length:
            raise ValueError(f"pack holds {self.length} tokens, more than pack_length {pack_length}")
        sizes = [len(tokens) for tokens, *_ in self.spans]

        def full(parts: list[np.ndarray], padding: int) -> torch.Tensor:
            return _int64([*parts, np.full(pack_length - self.length, padding)])

        def per_token(values: list[int], padding: int) -> torch.Tensor:
            return full([np.repeat(np.array(values, np.int64), sizes)], padding)

        real, generated, rows = np.array(self.pairs, np.int64).reshape(-1, 3).T
        return PackedBatch(
            input_ids=full([tokens for tokens, *_ in self.spans], pad_id),
            position_ids=full([np.arange(start, start + len(tokens)) for tokens, start, *_ in self.spans], 0),
            tree=per_token([tree for _, _, tree, _ in self.spans], -1),
            branch=per_token([branch for *_, branch in self.spans], 0),
            predict_at=_int64([at for at, _ in self.targets]),
            target_ids=_int64([tokens for _, tokens in self.targets]),
            segment=_int64([np.repeat(np.arange(len(self.targets)), [len(tokens) for _, tokens in self.targets])]),
            num_segments=len(self.targets),
            real_segment=_int64([real]),
            generated_segment=_int64([generated]),
            pair_row=_int64([rows]),
            runs=self._runs(pack_length),
            initial_segment=_int64([np.array(self.initial, np.int64)]) if with_initial else None,
        )

    def _runs(self, pack_length: int) -> tuple[Run, ...]:
        stops = np.cumsum([0, *(len(tokens) for tokens, *_ in self.spans)]).tolist()
        runs = [
            Run(*ends, tree, branch) for ends, (_, _, tree, branch) in zip(pairwise(stops), self.spans, strict=True)
        ]
        if self.length < pack_length:
            runs.append(Run(self.length, pack_length, -1, 0))
        return tuple(runs)


def _int64(parts: list[np.ndarray]) -> torch.Tensor:
    joined = np.concatenate(parts) if parts else np.empty(0)
    return torch.from_numpy(joined.astype(np.int64))
