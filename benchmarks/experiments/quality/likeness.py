"""Measures of how close replies are to people's replies to the same messages, fixed before the first run.

(a) accuracy of two independent discriminators, cross-fitted by conversation (0.5: cannot be told apart)
(b) MAUVE-like area on sentence embeddings (1: the same distribution)
(c) distinct-n, self-BLEU, distance between lengths, share cut at the limit
(d) log p of people's replies
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import embeddings
import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.stats import wasserstein_distance

from spin_ray.report.discriminator import correct_by_group, ngram_features
from spin_ray.report.responses import distinct_ngrams

DISCRIMINATORS = ("ngrams", "embeddings")
MAUVE_SCALE = 5.0
BLEU_ORDER = 4


def likeness(people: Sequence[str], texts: Sequence[str], conversations: Sequence[Hashable]) -> dict[str, Any]:
    """Returns (a), (b) and self-BLEU; ``told`` has the fraction told right for each conversation, in their order."""
    told: dict[str, Any] = {
        "ngrams": _rounded(correct_by_group(ngram_features(people), ngram_features(texts), conversations))
    }
    found: dict[str, Any] = {"told": told, "self_bleu": self_bleu(texts)}
    if embeddings.are_there():
        real, generated = embeddings.embed(list(people)), embeddings.embed(list(texts))
        told["embeddings"] = _rounded(correct_by_group(_scaled(real), _scaled(generated), conversations))
        found["mauve"] = mauve(real, generated)
    return found


def tokens(real: list[list[int]], generated: list[list[int]], stop: int) -> dict[str, float]:
    """Returns (c) of token ids, beside people's own."""
    lengths = [[len(ids) for ids in side] for side in (real, generated)]
    return {
        "generated_length": float(np.mean(lengths[1])),
        "real_length": float(np.mean(lengths[0])),
        "length_distance": float(wasserstein_distance(*lengths)),
        "cut": sum(ids[-1] != stop for ids in generated) / len(generated),
        "distinct_1": distinct_ngrams(generated, 1),
        "distinct_2": distinct_ngrams(generated, 2),
        "real_distinct_2": distinct_ngrams(real, 2),
    }


def _scaled(vectors: np.ndarray) -> np.ndarray:
    """Makes a coordinate's size about 1, as both discriminators share the penalty of the linear head."""
    return vectors * np.sqrt(vectors.shape[1])


def _rounded(values: np.ndarray | None) -> list[float] | None:
    return None if values is None else [round(float(value), 4) for value in values]


def mauve(real: np.ndarray, generated: np.ndarray) -> float:
    """Returns the area under the divergence frontier of two samples (Pillutla et al. 2021, arXiv 2102.01454).

    Both are quantised together, with a cluster for ten vectors of one sample; each count gets half a vector more.
    """
    clusters = max(2, len(real) // 10)
    _, of = kmeans2(np.concatenate([real, generated]).astype(np.float64), clusters, minit="++", seed=0, iter=20)
    sides = np.split(of, [len(real)])
    p, q = (np.bincount(side, minlength=clusters) + 0.5 for side in sides)
    p, q = p / p.sum(), q / q.sum()
    across, up = [0.0], [1.0]
    for weight in np.linspace(0.99, 0.01, 99):
        mixture = weight * p + (1 - weight) * q
        across.append(float(np.exp(-MAUVE_SCALE * np.sum(q * np.log(q / mixture)))))
        up.append(float(np.exp(-MAUVE_SCALE * np.sum(p * np.log(p / mixture)))))
    across.append(1.0)
    up.append(0.0)
    order = np.argsort(across, kind="stable")
    return float(np.trapezoid(np.asarray(up)[order], np.asarray(across)[order]))


def self_bleu(texts: Sequence[str]) -> float:
    """Returns the mean precision of each text's 1- to 4-grams with all other texts as references; 1: all the same.

    A shorter text counts with the sizes that it has; texts of fewer than two words are left out.
    """
    words = [text.lower().split() for text in texts]
    scores: list[list[float]] = [[] for _ in words]
    for size in range(1, BLEU_ORDER + 1):
        counts = [Counter(tuple(each[i : i + size]) for i in range(len(each) - size + 1)) for each in words]
        best: dict[tuple[str, ...], list[int]] = {}
        for count in counts:
            for gram, number in count.items():
                best[gram] = sorted([*best.get(gram, []), number], reverse=True)[:2]
        for place, count in enumerate(counts):
            if count:
                kept = sum(min(number, _others(best[gram], number)) for gram, number in count.items())
                scores[place].append(kept / count.total())
    means = [np.exp(np.mean(np.log(np.maximum(each, 1e-2)))) for each in scores if len(each) > 1]
    return float(np.mean(means)) if means else 0.0


def _others(two_best: list[int], own: int) -> int:
    if two_best[0] != own:
        return two_best[0]
    return two_best[1] if len(two_best) > 1 else 0
