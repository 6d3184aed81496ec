"""Readers of a run's records, also while the run goes on."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import RunDirError
from spin_ray.inputs.start_model import start_folder
from spin_ray.report.measures import Evaluation, stop_evidence
from spin_ray.run_dir.names import iterate_name, iterate_number, read_iterate
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import bytes_digest, table_from_bytes


def read_evaluations(run: RunDir, config: SpinConfig) -> list[Evaluation]:
    """Returns all evaluations, θ_0's first."""
    found = (read_evaluation(run, iterate) for iterate in range(config.iterations + 1))
    return [evaluation for evaluation in found if evaluation is not None]


def read_evaluation(run: RunDir, iterate: int) -> Evaluation | None:
    """Returns θ_iterate's evaluation; None if it is missing, damaged, or an ``eval.json`` of benchmarks alone."""
    found = run.evaluation(iterate)
    return found if found and "real_length" in found else None


def read_rows(run: RunDir, iterate: int) -> pa.Table | None:
    """Returns θ_iterate's measures by held-out row, in ROW_SCHEMA; None if they are missing or damaged."""
    content = run.storage.find(run.heldout_rows_path(iterate))
    try:
        return table_from_bytes(content) if content else None
    except (pa.ArrowException, OSError):
        return None


def read_all_rows(run: RunDir, evaluations: list[Evaluation]) -> dict[str, pa.Table]:
    """Returns the measures by held-out row of each evaluated iterate that has them."""
    found = {it["iterate"]: read_rows(run, iterate_number(it["iterate"])) for it in evaluations}
    return {name: rows for name, rows in found.items() if rows is not None}


def is_evaluated(run: RunDir, iterate: int) -> bool:
    """Tells whether θ_iterate's ``eval.json`` is there and its ``heldout_rows.parquet`` whole.

    An ``eval.json`` of benchmarks alone names no rows.
    """
    evaluation, content = run.evaluation(iterate) or {}, run.storage.find(run.heldout_rows_path(iterate))
    return content is not None and bytes_digest(content).sha256 == evaluation.get("heldout_rows")


def first_evaluation(evaluations: list[Evaluation]) -> Evaluation | None:
    """Returns θ_0's evaluation; None if it is missing or damaged."""
    return next((it for it in evaluations if it["iterate"] == iterate_name(0)), None)


def read_benchmarks(run: RunDir, config: SpinConfig) -> dict[str, dict[str, Any]]:
    found = {iterate_name(iterate): run.evaluation(iterate) or {} for iterate in range(config.iterations + 1)}
    return {name: evaluation["benchmarks"] for name, evaluation in found.items() if "benchmarks" in evaluation}


def evidence_to_stop(config: SpinConfig, evaluations: list[Evaluation]) -> dict[str, Any] | None:
    """Returns why ``stop_when`` ends the run now; None: go on."""
    rule = config.stop_when
    return stop_evidence(evaluations, rule.patience, rule.min_fall) if rule else None


def read_train_logs(run: RunDir, config: SpinConfig) -> dict[str, list[dict[str, Any]]]:
    names = [iterate_name(iterate) for iterate in range(config.iterations + 1)]
    logs = {name: run.train_log(name) for name in names}
    return {name: log for name, log in logs.items() if log}


def find_iterate(run: RunDir, iterate: str) -> int:
    """Returns an iterate's number from ``latest`` or a spelling that ``read_iterate`` reads.

    Raises:
        RunDirError: the run has no such iterate yet.
    """
    named = iterate.strip()
    number = read_iterate((run.latest() or "") if named == "latest" else named)
    iterations = run.config().iterations
    if number is None or number > iterations or (number and not run.model(number).is_committed):
        there = [iterate_name(n) for n in range(iterations + 1) if run.model(n).is_committed]
        raise RunDirError(f"{run.storage.root}: has no iterate {named}; it has {', '.join(there) or 'none yet'}")
    return number


def model_path(run: RunDir, iterate: int) -> Path:
    """Returns the folder of a whole model with θ_iterate's tokenizer. From a store it fetches no weights.

    The model is θ_iterate or the frozen base of its adapter. For θ_0 without a warm-up it is the start model.
    """
    model = run.whole_model(0 if run.is_adapter(iterate) else iterate)
    return model.local_folder(weights=False) if model.is_committed else start_folder(run, weights=False)
