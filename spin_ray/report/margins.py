"""Margins of held-out rows, from ``heldout_scores``.

A pair_id is PROMPT/self for the iterate's y′, PROMPT/opponent for its opponent's.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from spin_ray.report.uncertainty import standard_errors
from spin_ray.run_dir.names import OPPONENT, SELF, is_sample_of

SCORE_SCHEMA = pa.schema(
    [pa.field("pair_id", pa.string()), pa.field("model", pa.string())]
    + [pa.field(name, pa.float32()) for name in ("real_logp", "generated_logp")]
    + [pa.field(name, pa.list_(pa.float32())) for name in ("real_token_logps", "generated_token_logps")]
)
"""Log-probabilities in nats, per response and per token. θ_0 scores only own samples, unless it is the opponent."""
LARGEST_SHARE = 0.1
"""Fraction of a pair's tokens in margin_concentration."""


def row_margins(scores: pa.Table, model: str, opponent: str, beta: float, *, per_token: bool = False) -> Any:
    """Returns a frame by pair_id. ``real`` and ``generated`` are log p minus the opponent's, in nats.

    ``real_logp`` and ``generated_logp`` are the model's own.

    Args:
        per_token: True divides each difference by the tokens of its response, for the margin alone, as
            ``objective.length_normalised`` does.
    """
    columns = ["pair_id", "model", "real_logp", "generated_logp"]
    logps = ["real_logp", "generated_logp"]
    frame = scores.select(columns).to_pandas().pivot(index="pair_id", columns="model", values=logps)
    frame = frame.astype(np.float64)
    drift = {name: frame[f"{name}_logp"][model] - frame[f"{name}_logp"][opponent] for name in ("real", "generated")}
    result = drift["real"].to_frame("real")
    result["generated"] = drift["generated"]
    result[logps] = np.stack([frame[name][model] for name in logps], axis=1)
    lengths = _lengths(scores, model, result.index) if per_token else {"real": 1, "generated": 1}
    result["margin"] = beta * (result["real"] / lengths["real"] - result["generated"] / lengths["generated"])
    return result


def _lengths(scores: pa.Table, model: str, pair_ids: Any) -> Any:
    """Returns a frame by pair_id with the number of tokens of both responses."""
    own = scores.filter(pc.equal(scores["model"], model))
    counts = {name: pc.list_value_length(own[f"{name}_token_logps"]) for name in ("real", "generated")}
    frame = pa.table({"pair_id": own["pair_id"]} | counts).to_pandas().set_index("pair_id")
    return frame.loc[pair_ids].clip(lower=1)  # of an empty response the difference is 0


def margin_measures(
    scores: pa.Table,
    model: str,
    opponent: str,
    initial: str,
    beta: float,
    objective: Callable[[Any], np.ndarray] | None = None,
    *,
    per_token: bool = False,
    groups: Mapping[str, int],
) -> dict[str, Any]:
    """Returns the measures of ``eval.json`` from margins and drifts.

    Args:
        initial: θ_0's name.
        objective: gives the trained loss for each row of a ``row_margins`` frame.
        per_token: as in ``row_margins``.
        groups: result of ``conversation_groups``.
    """
    frame = row_margins(scores, model, opponent, beta, per_token=per_token)
    against = _rows_of(OPPONENT, frame)
    by_row = {"real_logp_drift": against["real"]}  # y is the same in the rows of both
    for whose in (OPPONENT, SELF):
        rows = _rows_of(whose, frame)
        by_row |= {
            f"against_{whose}.loss": np.logaddexp(0.0, -rows["margin"]),
            f"against_{whose}.margin": rows["margin"],
            f"against_{whose}.generated_logp_drift": rows["generated"],
        }
    by_row["against_opponent.accuracy"] = against["margin"] > 0
    if objective is not None:
        by_row["against_opponent.objective"] = pd.Series(objective(against), against.index)
    if concentrations := margin_concentrations(scores, model, opponent):
        by_row["against_opponent.margin_concentration"] = pd.Series(concentrations)
    by_row["kl_to_base"] = _rows_of(SELF, row_margins(scores, model, initial, beta)["generated"])
    measures: dict[str, Any] = {"beta": beta, "length_normalised": per_token}
    for key, values in by_row.items():
        section, _, name = key.rpartition(".")
        (measures.setdefault(section, {}) if section else measures)[name] = float(values.mean())
    errors = standard_errors(by_row, groups)
    measures["jsd_lower_bound"] = jsd_lower_bound(measures["against_opponent"]["loss"])
    errors |= jsd_error(errors, "against_opponent.loss")
    return measures | {"standard_errors": errors}


def jsd_lower_bound(loss: float) -> float:
    """Returns (ln 2 − loss) / 2 nats, a lower bound of JSD(data ‖ opponent).

    Args:
        loss: logistic loss of margins against the opponent.
    """
    return (math.log(2) - loss) / 2


def jsd_error(errors: dict[str, float], of_loss: str) -> dict[str, float]:
    """Returns the bound's standard error by its key, from the loss's; empty without that."""
    return {"jsd_lower_bound": errors[of_loss] / 2} if of_loss in errors else {}


def _rows_of(whose: str, rows: Any) -> Any:
    return rows[[is_sample_of(key, whose) for key in rows.index]]


def margin_concentrations(scores: pa.Table, model: str, opponent: str) -> dict[str, float]:
    """Returns for each pair with the opponent's y′ the share of changes of log p in the tenth of tokens with the most.

    Changes are absolute. Pairs without any are left out.
    """
    names = ["real_token_logps", "generated_token_logps"]
    scores = scores.filter(pa.array([is_sample_of(pair_id, OPPONENT) for pair_id in scores["pair_id"].to_pylist()]))
    tokens = {
        (pair_id, name): np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])
        for pair_id, name, *parts in zip(
            *(scores[column].to_pylist() for column in ("pair_id", "model", *names)), strict=True
        )
        if name in (model, opponent)
    }
    shares = {}
    for (pair_id, name), logps in tokens.items():
        if name == model:
            changes = np.sort(np.abs(logps - tokens[pair_id, opponent]))[::-1]
            if changes.sum() > 0:
                largest = math.ceil(LARGEST_SHARE * len(changes))
                shares[pair_id] = float(changes[:largest].sum() / changes.sum())
    return shares
