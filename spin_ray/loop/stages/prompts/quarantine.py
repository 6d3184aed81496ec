"""Rows that a run leaves out, with the reason, in RUN/quarantine."""

import logging
from collections import Counter
from dataclasses import dataclass
from math import ceil

import pyarrow as pa

from spin_ray.errors import DataError
from spin_ray.inputs.prompt_rows import Row
from spin_ray.inputs.survey import ALL_HELD_OUT
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.storage import table_from_bytes

logger = logging.getLogger(__name__)

QUARANTINE_SCHEMA = pa.schema(
    [pa.field(name, pa.string()) for name in ("stage", "origin", "reason", "detail")] + [pa.field("row", pa.binary())]
)
DUPLICATE = "duplicate"
LEAK = "leak"
"""Reason of a training row that is also held out."""
OVERLAP = "overlap"
"""Reason of a row that is also in an earlier source."""
_ELSEWHERE = (LEAK, OVERLAP)
"""Reasons of rows that do not count as unusable."""


def quarantine_row(stage: str, origin: str, reason: str, detail: str, raw: bytes) -> Row:
    detail = detail.encode(errors="backslashreplace").decode()  # Arrow cannot hold lone surrogates
    return {"stage": stage, "origin": origin, "reason": reason, "detail": detail, "row": raw}


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Number of a source's rows in quarantine, beside all that were read."""

    source: str
    read: int
    """Number of rows in the files."""
    made: int
    """Number of rows made of the usable ones: several of one with ``data.turns: all``."""
    reasons: Counter[str]
    first: int
    """Place of the source's first row in the quarantine's file."""


def check_source(found: Quarantined, artefact: Artefact, limit: float) -> None:
    """Compares unusable rows with all rows of a source, whatever ``max_rows`` or the source's share takes of them.

    Args:
        artefact: what the rows were read for.
        limit: ``data.max_quarantine_fraction``.

    Raises:
        DataError: more are unusable, or none is left.
    """
    source, reasons = found.source, found.reasons
    if leaks := reasons[LEAK]:
        logger.warning("%s: %d rows are held out, too, and are not trained on (data.keep_leaks)", source, leaks)
    if overlaps := reasons[OVERLAP]:
        logger.warning("%s: %d rows are in an earlier source, too, and are taken from that one", source, overlaps)
    unusable = Counter({reason: count for reason, count in reasons.items() if reason not in _ELSEWHERE})
    refused = unusable.total() - unusable[DUPLICATE]
    rows_of_each = found.made / max(found.read - refused, 1)
    every = found.read - int((leaks + overlaps) / rows_of_each) if leaks + overlaps else found.read
    bad = refused + ceil(unusable[DUPLICATE] / rows_of_each) if unusable[DUPLICATE] else refused
    if found.made > leaks and bad <= limit * every:
        if bad:
            logger.warning("%s: %d of %d rows in quarantine (%s)", source, bad, every, _counts(unusable))
        return
    where = f"quarantine/{artefact.path}.parquet"
    if not bad:
        raise DataError(f"{source}: {ALL_HELD_OUT if leaks else 'holds no rows'}")
    rows = table_from_bytes(artefact.storage.read(where)).slice(found.first, reasons.total()).to_pylist()
    first = next(row for row in rows if row["reason"] not in _ELSEWHERE)
    raise DataError(
        f"{source}: {bad} of {every} rows cannot be used ({_counts(unusable)}), "
        f"more than data.max_quarantine_fraction {limit:g}; "
        f"first: {first['origin']}: {first['reason']}: {first['detail']}; "
        f"all are in {artefact.storage.where(where)}"
    )


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
