"""Intervals of means over seeds and rows."""

import numpy as np

RESAMPLES = 10_000


def bootstrap(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Returns the mean of [seeds, rows] and its 95 % bootstrap interval; rows are drawn for all seeds together."""
    rng = np.random.default_rng(seed)
    seeds, rows = values.shape
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        by_row = values[rng.integers(seeds, size=seeds)].mean(axis=0)
        means[i] = by_row[rng.integers(rows, size=rows)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}
