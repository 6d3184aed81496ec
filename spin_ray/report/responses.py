"""Measures of responses as texts: lengths, truncation, repetition."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from spin_ray.report.uncertainty import standard_errors


def row_measures(heldout: pa.Table, answers: pa.Table) -> pd.DataFrame:
    """Returns lengths, truncation and equality by prompt_id, of ``answers`` in the order of ``heldout``."""
    real, generated = heldout["real_ids"].to_pylist(), answers["token_ids"].to_pylist()
    measures = {
        "real_length": [len(ids) for ids in real],
        "generated_length": [len(ids) for ids in generated],
        "truncation_rate": [reason == "length" for reason in answers["finish_reason"].to_pylist()],
        "identical_share": [left == right for left, right in zip(real, generated, strict=True)],
    }
    return pd.DataFrame(measures, heldout["prompt_id"].to_pylist())


def text_measures(
    heldout: pa.Table, answers: pa.Table, by_row: pd.DataFrame, groups: Mapping[str, int]
) -> dict[str, Any]:
    """Returns measures of length, truncation and repetition.

    Args:
        by_row: result of ``row_measures``.
        groups: result of ``conversation_groups``.
    """
    real, generated = heldout["real_ids"].to_pylist(), answers["token_ids"].to_pylist()
    prompts = heldout["prompt_ids"].to_pylist()
    measures: dict[str, Any] = {
        "length_auc": length_auc(by_row["real_length"].tolist(), by_row["generated_length"].tolist()),
        "duplicate_share": duplicate_share(prompts, generated),
        "real_duplicate_share": duplicate_share(prompts, real),
        "distinct_2": distinct_ngrams(generated, 2),
        "real_distinct_2": distinct_ngrams(real, 2),
    }
    measures |= {str(key): float(values) for key, values in by_row.mean().items()}
    return measures | {"standard_errors": standard_errors({str(key): values for key, values in by_row.items()}, groups)}


def length_auc(real: Sequence[int], generated: Sequence[int]) -> float:
    """Returns the chance that a human response is longer than a generated one; ties count half."""
    from scipy.stats import mannwhitneyu  # slow import, which scoring workers do not need

    return float(mannwhitneyu(real, generated).statistic / (len(real) * len(generated)))


def duplicate_share(prompts: list[list[int]], responses: list[list[int]]) -> float:
    """Returns the share of responses that repeat one to another prompt: a, b, a, a -> 1/2.

    Equal responses to the same prompt, which may be held out with several human responses, count once.
    """
    said = {(tuple(prompt), tuple(ids)) for prompt, ids in zip(prompts, responses, strict=True)}
    return 1 - len({ids for _, ids in said}) / max(len(said), 1)


def distinct_ngrams(responses: list[list[int]], n: int) -> float:
    """Returns different n-grams over all (arXiv 1510.03055): abab -> 2/3 for n = 2."""
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
