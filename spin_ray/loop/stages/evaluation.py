"""Measures of an iterate, from held-out rows and its own fresh samples.

Two margins of θ_t against θ_{t-1}:
    against_opponent   y′ ~ θ_{t-1}, the iteration's objective. (ln 2 - loss) / 2 is at most JSD(p_data ‖ θ_{t-1}).
    against_self       y′ ~ θ_t, to see whether θ_t tells its own samples from human responses.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.answers import answer_of, is_correct
from spin_ray.inputs.graders import Graded
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.inputs.rendering import tokenizer_of
from spin_ray.learner.losses import LOSSES, PairValues
from spin_ray.learner.step import Objective
from spin_ray.loop import scoring
from spin_ray.report.grading import grade_all
from spin_ray.report.history import is_evaluated, read_all_rows, read_evaluations, read_rows
from spin_ray.report.margins import margin_measures
from spin_ray.report.responses import row_measures, text_measures
from spin_ray.report.signs import warnings
from spin_ray.report.uncertainty import (
    ROW_SCHEMA,
    SHARE,
    changes_by_row,
    conversation_groups,
    standard_error,
)
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.names import heldout_pair_id, iterate_name, iterate_number
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import pairs_of
from spin_ray.run_dir.storage import bytes_digest, table_to_bytes


def run(
    run_dir: RunDir,
    config: SpinConfig,
    iterate: int,
    model: ModelFolder,
    previous: ModelFolder | None,
    initial: ModelFolder,
    objective: Objective | None = None,
) -> dict[str, Any]:
    """Writes and returns ``eval.json``, and writes ``heldout_rows.parquet``.

    Args:
        model: θ_iterate.
        previous: θ_{iterate-1}; None for θ_0.
        initial: θ_0.
        objective: the one that trained θ_iterate.
    """
    samples = run_dir.heldout_samples(iterate)
    made_from = {"samples": samples.manifest().digest, "model": model.digest}
    done = run_dir.evaluation(iterate) or {}
    if done.get("made_from") == made_from and is_evaluated(run_dir, iterate):
        return done
    with run_dir.stage(f"{model.name}/evaluation") as counted:
        every = read_answers(run_dir.heldout, samples, config.evaluation.samples)
        first = pc.equal(every[1]["sample"], 0)
        heldout, answers = (table.filter(first) for table in every)
        result: dict[str, Any] = {"iterate": model.name, "made_from": made_from, "rows": heldout.num_rows}
        groups = conversation_groups(heldout)
        result["conversations"] = len(set(groups.values()))
        by_row = row_measures(heldout, answers)
        texts = text_measures(heldout, answers, by_row, groups)
        grades = _grades(*every, config, model.whole.path)
        accuracy = _accuracy(grades, groups)
        texts["standard_errors"] |= accuracy.pop("standard_errors", {})
        result |= texts | accuracy | _changes(run_dir, iterate, _row_table(by_row, grades, groups))
        if previous is not None:
            samples_of = {"self": samples, "opponent": run_dir.heldout_samples(iterate - 1)}
            scores, work = _score(run_dir, config, samples_of, (model, previous, initial))
            counted |= work
            names, beta = (model.name, previous.name, initial.name), config.margin_beta(iterate - 1)
            per_token, losses = config.objective.length_normalised, _row_losses(config, objective)
            margins = margin_measures(scores, *names, beta, losses, per_token=per_token, groups=groups)
            margins["standard_errors"] |= result["standard_errors"]
            result |= {"opponent": previous.name} | margins
        counted |= {"rows": heldout.num_rows}
        run_dir.update_evaluation(iterate, lambda before: result | _benchmarks_of(model, before or {}))
    earlier = [it for it in read_evaluations(run_dir, config) if iterate_number(it["iterate"]) < iterate]
    rows = read_all_rows(run_dir, [*earlier, result])
    for text in warnings(result, earlier, rows, config.generation.sampling.max_tokens):
        run_dir.warn(model.name, text)
    return result


def _benchmarks_of(model: ModelFolder, before: dict[str, Any]) -> dict[str, Any]:
    """Returns lm-eval's results, which may have come before, unless they are of a model that was trained anew since."""
    if before.get("made_from", {}).get("model", model.digest) != model.digest:
        return {}
    return {key: it for key, it in before.items() if key == "benchmarks"}


def _row_losses(config: SpinConfig, objective: Objective | None) -> Callable[[Any], np.ndarray] | None:
    """Returns a function that computes the trained loss of each row of ``row_margins``.

    Returns None for the logistic loss, which is always measured, and for losses that need more than log-ratios.
    """
    if objective is None or not objective.is_of_log_ratios() or config.objective.reference_alpha < 1:
        return None
    loss, beta = objective.resolve(), objective.beta
    if loss == LOSSES["logistic"]:
        return None

    def of_rows(rows: Any) -> np.ndarray:
        policy = torch.tensor(rows[["real_logp", "generated_logp"]].to_numpy())
        reference = policy - torch.tensor(rows[["real", "generated"]].to_numpy())
        each = (
            loss(PairValues(*now.unbind(1)), PairValues(*then.unbind(1)), None, beta).item()
            for now, then in zip(policy.split(1), reference.split(1), strict=True)  # a loss sums over pairs
        )
        return np.array(list(each))

    return of_rows


def read_answers(heldout: Artefact, samples: Artefact, most: int = 1) -> tuple[pa.Table, pa.Table]:
    """Returns held-out rows and their first ``most`` samples. A row is repeated for each of its samples."""
    answers = pa.concat_tables(list(samples.tables()))
    answers = answers.filter(pc.less(answers["sample"], most))
    rows = pa.concat_tables(list(heldout.tables()))
    return rows.take(pc.index_in(answers["prompt_id"], value_set=rows["prompt_id"])), answers


def _accuracy(grades: dict[str, list[float]], groups: Mapping[str, int]) -> dict[str, Any]:
    """Returns pass@1, or an empty dict if no answer can be graded.

    Samples of a row are not independent, so the standard error is that of the rows' means.
    """
    if not grades:
        return {}
    by_row = np.asarray([np.mean(of_row) for of_row in grades.values()])
    counted = sum(map(len, grades.values()))
    numbers = [groups[prompt_id] for prompt_id in grades]
    found: dict[str, Any] = {
        "answer_accuracy": float(by_row.mean()),
        "answers_graded": len(grades),
        "conversations_graded": len(set(numbers)),
    }
    if counted > len(grades):
        found["samples_graded"] = counted
    error = standard_error(by_row, numbers, SHARE)
    return found | ({} if error is None else {"standard_errors": {"answer_accuracy": error}})


def _row_table(by_row: pd.DataFrame, grades: dict[str, list[float]], groups: Mapping[str, int]) -> pa.Table:
    accuracies = {prompt_id: float(np.mean(of_row)) for prompt_id, of_row in grades.items()}
    every = by_row.astype(np.float64).assign(answer_accuracy=pd.Series(accuracies, dtype=np.float64))
    columns = every.assign(prompt_id=by_row.index, conversation=by_row.index.map(dict(groups)))[ROW_SCHEMA.names]
    return pa.Table.from_pandas(columns, ROW_SCHEMA, preserve_index=False)


def _changes(run_dir: RunDir, iterate: int, rows: pa.Table) -> dict[str, Any]:
    """Stores the iterate's rows; returns their digest, and the changes since θ_0 where that was evaluated."""
    content = table_to_bytes(rows)
    run_dir.storage.replace(run_dir.heldout_rows_path(iterate), content)
    found: dict[str, Any] = {"heldout_rows": bytes_digest(content).sha256}
    before = read_rows(run_dir, 0) if iterate else None
    return found if before is None else found | {"changes": {"since": iterate_name(0)} | changes_by_row(before, rows)}


def _grades(heldout: pa.Table, answers: pa.Table, config: SpinConfig, model: Path) -> dict[str, list[float]]:
    extractor, grade = config.evaluation.answer_extractor, config.evaluation.grade
    if grade == "number" and extractor == "none":
        return {}
    tokenizer = tokenizer_of(model, config.model)
    texts = tokenizer.batch_decode(answers["token_ids"].to_pylist(), skip_special_tokens=True)
    every = zip(texts, heldout["answer_text"].to_pylist(), heldout["prompt_id"].to_pylist(), strict=True)
    rows = [row for row in every if row[1] is not None]
    found = _right_numbers(rows, extractor) if grade == "number" else grade_all(grade, rows, config)
    grades: dict[str, list[float]] = {}
    for (_, _, prompt_id), each in zip(rows, found, strict=True):
        if each is not None:
            grades.setdefault(prompt_id, []).append(each)
    return grades


def _right_numbers(rows: Sequence[Graded], extractor: str) -> list[float | None]:
    numbers = [answer_of(answer) for _, answer, _ in rows]
    return [
        None if number is None else float(is_correct(text, number, extractor))
        for (text, _, _), number in zip(rows, numbers, strict=True)
    ]


def _score(
    run_dir: RunDir,
    config: SpinConfig,
    samples_of: dict[str, Artefact],
    models: tuple[ModelFolder, ModelFolder, ModelFolder],
) -> tuple[pa.Table, dict[str, float]]:
    model, previous, initial = models
    rows = {whose: pair_rows(*read_answers(run_dir.heldout, samples), whose) for whose, samples in samples_of.items()}
    both = pa.concat_tables(list(rows.values()))
    of_initial = [] if initial.name == previous.name else [(initial, rows["self"])]
    inputs = {f"samples_of_{whose}": samples.manifest().digest for whose, samples in samples_of.items()}
    inputs |= {"model": model.digest, "opponent": previous.digest, "base": initial.digest}
    target = run_dir.artefact(f"{model.name}/heldout_scores")
    tables = ((model, both), (previous, both), *of_initial)
    return scoring.score(run_dir, config, target, tables, inputs, stage=f"{model.name}/evaluation")


def pair_rows(heldout: pa.Table, answers: pa.Table, whose: str) -> pa.Table:
    """Returns held-out rows and their answers as PAIR_SCHEMA rows."""
    ids = [heldout_pair_id(prompt_id, whose) for prompt_id in heldout["prompt_id"].to_pylist()]
    return pairs_of(ids, 0, heldout["prompt_id"], heldout["prompt_ids"], heldout["real_ids"], answers["token_ids"])
