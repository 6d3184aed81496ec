"""The classifier two-sample test: 0.5 for one distribution, near 1 for two, and never the prompt it learned on."""

import numpy as np
import pytest

from spin_ray.report.discriminator import correct_by_group, ngram_features, two_sample

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "green",
    "mat",
    "tree",
    "and",
    "then",
    "saw",
    "it",
    "today",
    "with",
    "much",
    "little",
    "joy",
]


def sentences(count: int, seed: int, words: list[str] = WORDS) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(words, random.integers(4, 12))) for _ in range(count)]


@pytest.mark.slow
def test_two_samples_of_one_distribution_cannot_be_told_apart():
    found = two_sample(ngram_features(sentences(200, 1)), ngram_features(sentences(200, 2)), range(200))
    assert found.low <= 0.5 <= found.high
    assert found.high - found.low < 0.2
    assert found.groups == 200


@pytest.mark.slow
def test_two_distributions_are_told_apart_whichever_is_called_human():
    assisted = [f"Certainly! {text}" for text in sentences(60, 2)]
    real, generated = ngram_features(sentences(60, 1)), ngram_features(assisted)
    found = two_sample(real, generated, range(60))
    assert found.accuracy > 0.95
    assert found.low <= found.accuracy <= found.high
    assert two_sample(generated, real, range(60)) == found


def test_a_text_learned_by_heart_does_not_help():
    """Each conversation has a word of its own, and three rows with the same response."""
    groups = np.repeat(np.arange(40), 3)
    random = np.random.default_rng(0)
    features = random.normal(size=(40, 60))[groups]
    told = correct_by_group(features, random.normal(size=(40, 60))[groups], groups)
    assert len(told) == 40
    assert told.mean() == pytest.approx(0.5, abs=0.2)


def test_equal_responses_count_half():
    same = ngram_features(sentences(10, 3))
    assert two_sample(same, same, range(10)).accuracy == 0.5


def test_too_few_prompts_say_nothing():
    assert two_sample(ngram_features(["a"] * 4), ngram_features(["b"] * 4), range(4)) is None


def test_features_are_the_texts_own_and_of_norm_one():
    features = ngram_features(["", "hello", "hello there, \U0001f600", "hello"])
    norms = np.sqrt(features.multiply(features).sum(axis=1))
    assert np.allclose(norms, 1)
    assert (features[1] != features[3]).nnz == 0
    assert (features[1] != features[2]).nnz > 0
