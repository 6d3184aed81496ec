"""A teacher's distributions for the rows of a table (SDFT)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.distillation import TopTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The distributions of one rank's rows, in CPU memory."""

    places: Mapping[int, range]
    """Each row's tokens in ``top``, for this rank's rows."""
    top: TopTokens

    @classmethod
    def of(cls, parts: Iterable[pa.Table], rows: Mapping[str, int]) -> "Teacher":
        """Reads TEACHER_SCHEMA rows.

        Args:
            rows: row in the pair table by ``pair_id``; other pairs are skipped.

        Raises:
            ValueError: a pair has no distributions, or more than one.
        """
        wanted = pa.array(rows.keys(), pa.string())
        own = [part.filter(pc.is_in(part["pair_id"], value_set=wanted)) for part in parts]
        pair_ids = [pair_id for part in own for pair_id in part["pair_id"].to_pylist()]
        if sorted(pair_ids) != sorted(rows):
            raise ValueError(f"{len(pair_ids)} rows for {len(rows)} pairs")
        counts = [count for part in own for count in pc.list_value_length(part["rest_logps"]).to_pylist()]
        stops = np.cumsum([0, *counts]).tolist()
        places = {rows[pair_id]: range(*ends) for pair_id, ends in zip(pair_ids, pairwise(stops), strict=True)}
        ids, logps, rest = (
            torch.from_numpy(np.concatenate([np.empty(0, dtype), *(_flat(part, name) for part in own)], dtype=dtype))
            for name, dtype in (("top_ids", np.int32), ("top_logps", np.float32), ("rest_logps", np.float32))
        )
        k = len(ids) // max(len(rest), 1)
        return cls(places=places, top=TopTokens(ids.view(len(rest), k), logps.view(len(rest), k), rest))

    def of_pack(self, batch: PackedBatch) -> TopTokens:
        """Returns the distributions of the pack's targets, in their order, on its device."""
        rows = batch.pair_row[batch.real_segment.argsort()].tolist()
        places = torch.tensor([place for row in rows for place in self.places[row]], dtype=torch.int64)
        if len(places) != len(batch.target_ids):
            raise ValueError(f"the teacher has {len(places)} tokens for a pack of {len(batch.target_ids)}")
        ids, logps, rest = (part[places].to(batch.target_ids.device) for part in self.top)
        return TopTokens(ids.long(), logps, rest)


def _flat(rows: pa.Table, name: str) -> np.ndarray:
    parts = [chunk.flatten().to_numpy() for chunk in rows[name].chunks]
    return np.concatenate(parts) if parts else np.empty(0)


def teacher_columns(pair_ids: Sequence[str], top: TopTokens, batch: PackedBatch) -> pa.Table:
    """Returns a pack's rows (without y′) as TEACHER_SCHEMA columns; ``pair_ids`` are those of all rows of the table."""
    *distributions, segment = (part.cpu() for part in (*top, batch.segment))
    members = [segment == number for number in batch.real_segment.tolist()]
    columns = [[part[mine].flatten().numpy() for mine in members] for part in distributions]
    types = (pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.float32()))
    arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    names = ["pair_id", "top_ids", "top_logps", "rest_logps"]
    return pa.table([pa.array([pair_ids[row] for row in batch.pair_row.tolist()], pa.string()), *arrays], names)
