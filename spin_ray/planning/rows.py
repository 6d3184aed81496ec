"""Numbers of rows in a recipe's data, counted or estimated before anything is rendered."""

from contextlib import suppress
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import DataConfig, Train, sources_of

if TYPE_CHECKING:
    from spin_ray.inputs.sources import SourceRow

SAMPLE_ROWS = 256
_MARGIN = 1.05
"""Factor of estimates. A row more than expected would be a shard more, for which all engines but one wait."""


def settle(config: SpinConfig, rows: int) -> SpinConfig:
    """Returns a copy with the sizes that a start would give it, if ``data.train`` has so many rows."""
    from spin_ray.inputs.sources import is_estimated

    paths = [source.path for source in sources_of(config.data.train)]
    known = all("://" not in path or is_estimated(path) for path in paths)
    return config.settle_sizes(rows=rows if known else None)


def rows_at_start(played: Train, data: DataConfig) -> int | None:
    """Returns the rows by which a start sizes shards, rather too many than too few; None if some cannot be estimated.

    Args:
        played: sources of the rows whose prompts are answered.

    Raises:
        DataError: a file cannot be read.
    """
    from spin_ray.inputs.mixture import expected_shares
    from spin_ray.inputs.sources import count_rows, estimate_rows, find_files

    counts = []
    for source in sources_of(played):
        files = find_files(source.path)
        count = estimate_rows(files) if "://" in source.path else count_rows(files)
        if count is None:
            return None
        if data.turns == "all":
            rows = first_rows(files, data)
            count = ceil(_MARGIN * count * max(1, _responses(rows, data)) / max(1, len(rows)))
        counts.append(ceil(count * data.trained_fraction))
    return sum(expected_shares(sources_of(played), counts))


def count_responses(source: str, data: DataConfig) -> int:
    """Estimates a local source's rows by ``data.turns``. Nothing is tokenised, so that too long ones count."""
    from spin_ray.inputs.sources import count_rows, find_files

    files = find_files(source)
    rows = first_rows(files, data)
    return round(count_rows(files) * _responses(rows, data) / max(1, len(rows)))


def _responses(rows: list["SourceRow"], data: DataConfig) -> int:
    from spin_ray.inputs.conversations import Unusable, conversations_of

    found = 0
    for row in rows:
        with suppress(Unusable):
            found += len(conversations_of(row.content, data))
    return found


def first_rows(files: list[str], data: DataConfig) -> list["SourceRow"]:
    """Returns the first ``SAMPLE_ROWS`` rows; raises DataError if they cannot be read."""
    from spin_ray.inputs.sources import rows_in

    return list(islice(rows_in(files, data.columns), SAMPLE_ROWS))
