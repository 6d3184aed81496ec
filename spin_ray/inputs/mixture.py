"""Draws of rows from several sources."""

from collections.abc import Sequence

import numpy as np

from spin_ray.config.sections import Source
from spin_ray.errors import DataError


def shares_of(sources: Sequence[Source], usable: Sequence[int], setting: str = "data.train") -> list[int]:
    """Returns the number of rows from each source.

    Weighted sources give rows in proportion, as many as possible without repeating a row.

    Raises:
        DataError: a source has no usable row, or fewer than its ``rows``.
    """
    for source, count in zip(sources, usable, strict=True):
        if count < (source.rows or 1):
            raise DataError(
                f"{source.path}: has {count} usable rows, {setting} asks for {source.rows or 'some'}; "
                "spin-ray doctor shows how many are refused, held out or in an earlier source"
            )
    scale = min((count / each.weight for each, count in zip(sources, usable, strict=True) if each.weight), default=0.0)
    return [
        max(1, int(scale * source.weight + 1e-9)) if source.weight else source.rows or count
        for source, count in zip(sources, usable, strict=True)
    ]


def expected_shares(sources: Sequence[Source], estimated: Sequence[int]) -> list[int]:
    """Returns ``shares_of`` estimated numbers of rows. A source counts as having its ``rows``, and at least one."""
    return shares_of(sources, [max(it.rows or 1, count) for it, count in zip(sources, estimated, strict=True)])


def warn_of_limit(sources: Sequence[Source], usable: Sequence[int], setting: str = "data.train") -> str | None:
    """Returns a warning if the scarcest weighted source leaves most rows of the others unused; None otherwise.

    Raises:
        DataError: as ``shares_of`` does.
    """
    shares = shares_of(sources, usable, setting)
    weighted = [number for number, source in enumerate(sources) if source.weight]
    if len(weighted) < 2:
        return None
    scarcest = min(weighted, key=lambda number: usable[number] / (sources[number].weight or 1))
    others = [number for number in weighted if number != scarcest]
    drawn, whole = (sum(counts[number] for number in others) for counts in (shares, usable))
    if 2 * drawn >= whole:
        return None
    return (
        f"{sources[scarcest].path}: its {usable[scarcest]:,} usable rows limit the mixture at weight "
        f"{sources[scarcest].weight:g}: only {drawn:,} of the {whole:,} usable rows of the other sources with a weight "
        "are drawn; lower its weight, give it more rows, or leave the weights out to take every row"
    )


def draw(
    usable: Sequence[np.ndarray],
    sources: Sequence[Source],
    source_of: Sequence[int],
    seed: int,
    setting: str = "data.train",
) -> list[int]:
    """Draws rows without repetition; returns their number per source.

    Args:
        usable: a mask of rows per slice; set to the drawn rows.
        source_of: the source's index per slice.
        setting: the sources' name in errors.

    Raises:
        DataError: a source has too few rows.
    """
    every = np.concatenate(usable)
    where = np.repeat(np.asarray(source_of), [len(mask) for mask in usable])
    places = [np.flatnonzero(every & (where == number)) for number in range(len(sources))]
    shares = shares_of(sources, [len(each) for each in places], setting)
    taken = np.zeros(len(every), bool)
    for number, (each, share) in enumerate(zip(places, shares, strict=True)):
        taken[np.random.default_rng([seed, number]).choice(each, share, replace=False)] = True
    ends = np.cumsum([len(mask) for mask in usable])[:-1]
    for mask, drawn in zip(usable, np.split(taken, ends), strict=True):
        mask[:] = drawn
    return shares
