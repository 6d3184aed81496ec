"""Choice of the rows to keep: the first of each kind, neither held out nor beyond ``max_rows``."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Masks(NamedTuple):
    """Rows of a slice. All that are in no mask are beyond ``max_rows``."""

    keep: np.ndarray
    repeated: np.ndarray
    """Rows that repeat an earlier one of their source."""
    overlapping: np.ndarray
    """First rows of their kind in their source that repeat one of an earlier source."""
    held_out: np.ndarray


def first_of_each(
    ids: list[np.ndarray], source_of: Sequence[int], limit: int | None, leaked: np.ndarray | None
) -> list[Masks]:
    """Returns the masks of each slice.

    Args:
        ids: prompt ids by slice.
        source_of: the source's index per slice.
        limit: number of rows to keep; None: all.
        leaked: ids of held-out rows; None: none.
    """
    every = np.concatenate(ids)
    held_out = np.zeros(len(every), bool) if leaked is None else np.isin(every, leaked)
    _, first, which = np.unique(every, return_index=True, return_inverse=True)
    is_first = np.zeros(len(every), bool)
    is_first[first] = True
    is_first &= ~held_out
    keep = is_first & (np.cumsum(is_first) <= (len(every) if limit is None else limit))
    repeated = ~is_first & keep[first[which]]
    overlapping = repeated & _first_of_its_source(every, np.repeat(source_of, [len(each) for each in ids]))
    ends = np.cumsum([len(each) for each in ids])[:-1]
    masks = (keep, repeated & ~overlapping, overlapping, held_out)
    return [Masks(*each) for each in zip(*(np.split(mask, ends) for mask in masks), strict=True)]


def _first_of_its_source(ids: np.ndarray, source: np.ndarray) -> np.ndarray:
    found = np.zeros(len(ids), bool)
    for number in np.unique(source):
        places = np.flatnonzero(source == number)
        found[places[np.unique(ids[places], return_index=True)[1]]] = True
    return found
