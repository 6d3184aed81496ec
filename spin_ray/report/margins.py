"""Log-probabilities of held-out rows under an iterate, its opponent and θ_0 -> what margins say of the iterate.

RUN/<iterate>/heldout_scores: a row for each pair and model; pair_id is PROMPT/self or PROMPT/opponent, whose y′ it is
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa

from spin_ray.report.measures import standard_error
from spin_ray.run_dir.names import SELF, is_sample_of

SCORE_SCHEMA = pa.schema(
    [pa.field("pair_id", pa.string()), pa.field("model", pa.string())]
    + [pa.field(name, pa.float32()) for name in ("real_logp", "generated_logp")]
    + [pa.field(name, pa.list_(pa.float32())) for name in ("real_token_logps", "generated_token_logps")]
)
"""The sums over response tokens, in nats, and the tokens'. θ_0 scores the iterate's own samples only."""
LARGEST_SHARE = 0.1
"""Of the tokens of a pair, whose part in the margin is its concentration."""


def row_margins(scores: pa.Table, model: str, opponent: str, beta: float) -> Any:
    """Frame by pair_id: ``real``, ``generated`` (log p under the model minus that under the opponent), ``margin``."""
    columns = ["pair_id", "model", "real_logp", "generated_logp"]
    logps = ["real_logp", "generated_logp"]
    frame = scores.select(columns).to_pandas().pivot(index="pair_id", columns="model", values=logps)
    frame = frame.astype(np.float64)
    drift = {name: frame[f"{name}_logp"][model] - frame[f"{name}_logp"][opponent] for name in ("real", "generated")}
    result = drift["real"].to_frame("real")
    result["generated"] = drift["generated"]
    result["margin"] = beta * (result["real"] - result["generated"])
    return result


def margin_measures(scores: pa.Table, model: str, opponent: str, base: str, beta: float) -> dict[str, Any]:
    """Loss, margin, its accuracy and concentration for both kinds of y', how far log p(y) and log p(y') moved, and the
    distance from the base.
    """
    frame = row_margins(scores, model, opponent, beta)
    concentrations = margin_concentrations(scores, model, opponent)
    measures: dict[str, Any] = {"beta": beta, "real_logp_drift": float(frame["real"].mean())}
    errors: dict[str, float] = {}
    for whose in ("opponent", "self"):
        rows = frame[[is_sample_of(key, whose) for key in frame.index]]
        margin = rows["margin"].to_numpy()
        by_row = {
            "loss": np.logaddexp(0.0, -margin),
            "margin": margin,
            "accuracy": (margin > 0).astype(np.float64),
            "generated_logp_drift": rows["generated"].to_numpy(),
        }
        shares = [share for pair_id, share in concentrations.items() if is_sample_of(pair_id, whose)]
        if shares:
            by_row["margin_concentration"] = np.asarray(shares)
        measures[f"against_{whose}"] = {key: float(values.mean()) for key, values in by_row.items()}
        errors |= {f"against_{whose}.{key}": standard_error(values) for key, values in by_row.items()}
        errors["real_logp_drift"] = standard_error(rows["real"].to_numpy())  # the same rows of y in both kinds
    measures["jsd_lower_bound"] = (math.log(2) - measures["against_opponent"]["loss"]) / 2
    errors["jsd_lower_bound"] = errors["against_opponent.loss"] / 2
    from_base = row_margins(scores, model, base, beta)["generated"]
    from_base = from_base[[is_sample_of(key, SELF) for key in from_base.index]].to_numpy()
    measures["kl_to_base"], errors["kl_to_base"] = float(from_base.mean()), standard_error(from_base)
    return measures | {"standard_errors": errors}


def margin_concentrations(scores: pa.Table, model: str, opponent: str) -> dict[str, float]:
    """By pair_id, the share of the absolute changes of log p that the largest tenth of the tokens has (rounded up).

    A token of y adds its change to the margin, one of y' takes it away. Pairs without any change have none. Example:
    changes 3, −1 of y and 1, 0 of y': the largest of four tokens has 3 of 5.
    """
    names = ["real_token_logps", "generated_token_logps"]
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
