"""Intervals of means over seeds and rows."""

import numpy as np

RESAMPLES = 10_000


def bootstrap(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Returns mean and 95 % bootstrap interval of [seeds, rows]; seeds and rows are drawn, rows for all seeds alike."""
    rng = np.random.default_rng(seed)
    seeds, rows = values.shape
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        by_row = values[rng.integers(seeds, size=seeds)].mean(axis=0)
        means[i] = by_row[rng.integers(rows, size=rows)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}
