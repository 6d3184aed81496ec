"""Classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv 1610.06545): can responses be told from human ones?

A linear classifier, independent of the trained model, is trained on some prompts and tested on others. Accuracy 0.5
means that it sees no difference.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import minimize

Features = Any
"""Matrix [texts, features], dense or sparse."""

FOLDS = 5
RESAMPLES = 2000
WIDER = math.sqrt(1 + FOLDS / (FOLDS - 1))
"""Factor of the bootstrap's interval, which takes the groups as independent though their classifiers share training
texts (Nadeau and Bengio 2003, "Inference for the generalization error")."""
PENALTY = 0.1
"""Weight of half the squared norm of the weights. The losses are summed over texts."""
NGRAM_SIZES = (1, 2, 3, 4)
BUCKETS = 1 << 15
_SEED = 0
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class TwoSample:
    """Accuracy, with a 95 % interval over groups."""

    accuracy: float
    low: float
    high: float
    groups: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def two_sample(real: Features, generated: Features, groups: Sequence[Hashable]) -> TwoSample | None:
    """Returns the accuracy on groups that the classifier did not see; None for fewer groups than folds.

    Args:
        generated: responses to the prompts of ``real``, in the same order.
        groups: prompt or conversation of each row, never split between training and test.
    """
    correct = correct_by_group(real, generated, groups)
    if correct is None:
        return None
    mean, ends = float(correct.mean()), bootstrap(correct)
    low, high = (min(max(mean + WIDER * (end - mean), 0.0), 1.0) for end in ends)
    return TwoSample(mean, low, high, len(correct))


def correct_by_group(real: Features, generated: Features, groups: Sequence[Hashable]) -> np.ndarray | None:
    """Returns the fraction of each group's texts classified correctly, in order of first appearance.

    A score of exactly 0 counts half.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    if len(numbers) < FOLDS:
        return None
    group = np.asarray([numbers[each] for each in groups])
    fold = np.random.default_rng(_SEED).permutation(len(numbers))[group] % FOLDS
    right = np.zeros(len(group))
    real, generated = sparse.csr_matrix(real), sparse.csr_matrix(generated)
    for held_out in range(FOLDS):
        train, test = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        weights = _fit(sparse.vstack([real[train], generated[train]], "csr"), np.repeat([1.0, -1.0], len(train)))
        for side, sign in ((real, 1.0), (generated, -1.0)):
            right[test] += (np.sign(_score(side[test], weights)) * sign + 1) / 4
    sums, counts = np.bincount(group, right), np.bincount(group)
    return sums / counts


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % interval of the mean over resampled values."""
    random = np.random.default_rng([_SEED, 0xB0])
    means = values[random.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def ngram_features(texts: Sequence[str]) -> sparse.csr_matrix:
    """Returns hashed character n-grams of each text with marked ends: square roots of counts, of norm 1."""
    columns, counts, starts = [], [], [0]
    for text in texts:
        codes = np.frombuffer(f"\x02{text}\x03".encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        found, count = np.unique(np.concatenate([_hashes(codes, size) for size in NGRAM_SIZES]), return_counts=True)
        weights = np.sqrt(count)
        columns.append(found)
        counts.append(weights / np.linalg.norm(weights))
        starts.append(starts[-1] + len(found))
    data = np.concatenate(counts) if counts else np.zeros(0)
    indices = np.concatenate(columns) if columns else np.zeros(0, np.int64)
    return sparse.csr_matrix((data, indices, starts), shape=(len(texts), BUCKETS))


def _hashes(codes: np.ndarray, size: int) -> np.ndarray:
    windows = max(len(codes) - size + 1, 0)
    value = np.full(windows, size, np.uint64)
    for place in range(size):
        value = (value ^ codes[place : place + windows]) * _MIX
        value ^= value >> np.uint64(29)
    return (value % np.uint64(BUCKETS)).astype(np.int64)


def _score(features: Features, weights: np.ndarray) -> np.ndarray:
    return features @ weights[:-1] + weights[-1]


def _fit(features: Features, labels: np.ndarray) -> np.ndarray:
    """Returns weights and intercept of logistic regression. Labels are 1 and −1."""

    def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = labels * _score(features, weights)
        pull = -labels / (1 + np.exp(np.clip(margins, -500, 500)))
        gradient = np.append(features.T @ pull, pull.sum())
        gradient[:-1] += PENALTY * weights[:-1]
        value = np.logaddexp(0, -margins).sum() + PENALTY / 2 * weights[:-1] @ weights[:-1]
        return float(value), gradient

    start = np.zeros(features.shape[1] + 1)
    return minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
