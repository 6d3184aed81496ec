"""Measures of an iterate, from held-out rows and its own fresh samples.

Two margins of θ_t against θ_{t-1}:
    against_opponent   y′ ~ θ_{t-1}, the iteration's objective. (ln 2 - loss) / 2 is at most JSD(p_data ‖ θ_{t-1}).
    against_self       y′ ~ θ_t, to see whether θ_t tells its own samples from human responses.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.answers import is_correct
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.losses import LOSSES, PairValues, pair_logps, response_logps
from spin_ray.learner.step import Objective, PackShape, feed, pair_lengths, plan
from spin_ray.planning.mesh import mesh_of
from spin_ray.report.grading import grade_all
from spin_ray.report.history import read_rows
from spin_ray.report.margins import SCORE_SCHEMA, margin_measures
from spin_ray.report.measures import distinct_ngrams, duplicate_share
from spin_ray.report.signs import warnings
from spin_ray.report.uncertainty import (
    ROW_SCHEMA,
    SHARE,
    changes_by_row,
    conversation_groups,
    standard_error,
    standard_errors,
)
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.names import heldout_pair_id, iterate_name, part_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA
from spin_ray.run_dir.storage import table_to_bytes
from spin_ray.runtime.workers import device, nodes_and_room, run_workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    recipe: SpinConfig
    tables: tuple[tuple[ModelFolder, pa.Table], ...]
    """Models with their PAIR_SCHEMA rows. ``pair_id`` ends with ``/self`` or ``/opponent``."""
    shape: PackShape
    backend: BackendSettings
    target: Artefact


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
    if done.get("made_from") == made_from:
        return done
    with run_dir.stage(f"{model.name}/evaluation") as counted:
        every = read_answers(run_dir.heldout, samples, config.evaluation.samples)
        first = pc.equal(every[1]["sample"], 0)
        heldout, answers = (table.filter(first) for table in every)
        result: dict[str, Any] = {"iterate": model.name, "made_from": made_from, "rows": heldout.num_rows}
        groups = conversation_groups(heldout)
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
            names, beta = (model.name, previous.name, initial.name), config.at(iterate - 1).beta
            per_token, losses = config.objective.length_normalised, _row_losses(config, objective)
            margins = margin_measures(scores, *names, beta, losses, per_token=per_token, groups=groups)
            margins["standard_errors"] |= result["standard_errors"]
            result |= {"opponent": previous.name} | margins
        counted |= {"rows": heldout.num_rows}
        run_dir.update_evaluation(iterate, lambda before: result | _benchmarks_of(model, before or {}))
    start = run_dir.evaluation(0) if iterate else None
    for text in warnings(result, start):
        logger.warning("%s: %s", model.name, text)
        run_dir.event("warning", model.name, text=text)
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
    if objective is None or objective.length_normalised or config.objective.reference_alpha < 1:
        return None
    loss, beta = objective.resolve(), objective.beta
    if loss == LOSSES["logistic"] or not loss.needs_reference or loss.needs_wins:
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
    measures: dict[str, Any] = {
        "length_auc": length_auc(by_row["real_length"].tolist(), by_row["generated_length"].tolist()),
        "duplicate_share": duplicate_share(generated),
        "real_duplicate_share": duplicate_share(real),
        "distinct_2": distinct_ngrams(generated, 2),
        "real_distinct_2": distinct_ngrams(real, 2),
    }
    measures |= {str(key): float(values) for key, values in by_row.mean().items()}
    return measures | {"standard_errors": standard_errors({str(key): values for key, values in by_row.items()}, groups)}


def _accuracy(grades: dict[str, list[float]], groups: Mapping[str, int]) -> dict[str, Any]:
    """Returns pass@1, or an empty dict if no answer can be graded.

    Samples of a row are not independent, so the standard error is that of the rows' means.
    """
    if not grades:
        return {}
    by_row = np.asarray([np.mean(of_row) for of_row in grades.values()])
    counted = sum(map(len, grades.values()))
    found: dict[str, Any] = {"answer_accuracy": float(by_row.mean()), "answers_graded": len(grades)}
    if counted > len(grades):
        found["samples_graded"] = counted
    error = standard_error(by_row, [groups[prompt_id] for prompt_id in grades], SHARE)
    return found | ({} if error is None else {"standard_errors": {"answer_accuracy": error}})


def _row_table(by_row: pd.DataFrame, grades: dict[str, list[float]], groups: Mapping[str, int]) -> pa.Table:
    rows = [
        {"prompt_id": prompt_id, "conversation": groups[prompt_id]}
        | {"answer_accuracy": float(np.mean(grades[prompt_id])) if prompt_id in grades else None}
        | {name: float(values[name]) for name in ("truncation_rate", "generated_length")}
        for prompt_id, values in zip(by_row.index, by_row.to_dict("records"), strict=True)
    ]
    return pa.Table.from_pylist(rows, ROW_SCHEMA)


def _changes(run_dir: RunDir, iterate: int, rows: pa.Table) -> dict[str, Any]:
    """Stores the iterate's rows, and returns its changes since θ_0 where that was evaluated."""
    run_dir.storage.replace(run_dir.heldout_rows_path(iterate), table_to_bytes(rows))
    before = read_rows(run_dir, 0) if iterate else None
    return {} if before is None else {"changes": {"since": iterate_name(0)} | changes_by_row(before, rows)}


def _grades(heldout: pa.Table, answers: pa.Table, config: SpinConfig, model: Path) -> dict[str, list[float]]:
    extractor, grade = config.evaluation.answer_extractor, config.evaluation.grade
    column = "answer" if grade == "number" else "answer_text"
    if (grade == "number" and extractor == "none") or column not in heldout.column_names:
        return {}
    tokenizer = load_tokenizer(str(model), trust_remote_code=config.model.trust_remote_code)
    texts = tokenizer.batch_decode(answers["token_ids"].to_pylist(), skip_special_tokens=True)
    rows = [
        row
        for row in zip(texts, heldout[column].to_pylist(), heldout["prompt_id"].to_pylist(), strict=True)
        if row[1] is not None
    ]
    if grade == "number":
        found = [float(is_correct(text, answer, extractor)) for text, answer, _ in rows]
    else:
        found = grade_all(grade, rows)
    grades: dict[str, list[float]] = {}
    for (_, _, prompt_id), each in zip(rows, found, strict=True):
        if each is not None:
            grades.setdefault(prompt_id, []).append(each)
    return grades


def length_auc(real: Sequence[int], generated: Sequence[int]) -> float:
    """Returns the chance that a human response is longer than a generated one; ties count half."""
    from scipy.stats import mannwhitneyu  # slow import, which scoring workers do not need

    return float(mannwhitneyu(real, generated).statistic / (len(real) * len(generated)))


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
    return score(run_dir, config, target, ((model, both), (previous, both), *of_initial), inputs)


def score(
    run_dir: RunDir,
    config: SpinConfig,
    target: Artefact,
    tables: tuple[tuple[ModelFolder, pa.Table], ...],
    inputs: dict[str, str],
) -> tuple[pa.Table, dict[str, float]]:
    """Scores each table of PAIR_SCHEMA rows under its model, and commits ``target``.

    Returns SCORE_SCHEMA rows, and counts of the work done by this call.
    """
    settings = {
        "precision": config.train.precision,
        "pack_length": config.train.pack_length,
        "workers": config.train.workers,
    }
    work: dict[str, float] = {}
    if not target.already_made(inputs, settings):
        model, rows = tables[0]
        job = ScoreJob(
            recipe=config,
            tables=tables,
            shape=PackShape(
                pack_length=config.train.pack_length, global_batch_pairs=rows.num_rows, pad_id=model.pad_id
            ),
            backend=BackendSettings.for_scoring(config),
            target=target,
        )
        folder = f"{target.path.rpartition('/')[0]}/scoring"
        work = run_workers(_worker, job, config, f"evaluation-{model.digest[:16]}", run_dir.storage.where(folder))
        run_dir.storage.delete(folder)
        names = [part_name(rank) for rank in range(int(work.pop("ranks")))]
        target.commit({name: target.part_entry(name) for name in names}, inputs, settings)
    return pa.concat_tables(list(target.tables())), work


def pair_rows(heldout: pa.Table, answers: pa.Table, whose: str) -> pa.Table:
    """Returns held-out rows and their answers as PAIR_SCHEMA rows."""
    pair_ids = pa.array([heldout_pair_id(prompt_id, whose) for prompt_id in heldout["prompt_id"].to_pylist()])
    columns = [pair_ids, heldout["prompt_id"], pa.array([0] * len(pair_ids), pa.int32())]
    return pa.table([*columns, heldout["prompt_ids"], heldout["real_ids"], answers["token_ids"]], schema=PAIR_SCHEMA)


def _worker(job: ScoreJob) -> dict[str, float]:
    tables = []
    tokens, work_s = 0, 0.0
    mesh = mesh_of(job.recipe, job.tables[0][0].parts_here()[0], *nodes_and_room()).mesh
    settings, shape = replace(job.backend, mesh=mesh), replace(job.shape, tensor=mesh.tensor)
    for model, rows in job.tables:
        folder, adapter = model.parts_here()
        backend = Fsdp2Backend(folder, replace(settings, adapter=adapter), device())
        started = time.monotonic()
        tables.append(_score_rows(backend, rows, shape, model.name))
        work_s += time.monotonic() - started
        tokens += sum(pc.sum(pc.list_value_length(rows[f"{name}_ids"])).as_py() for name in ("real", "generated"))
        backend.close()
    rank, ranks = shape.place()
    if shape.writes():
        job.target.replace_part(part_name(rank), pa.concat_tables(tables))
    dist.barrier()
    return {"tokens": tokens, "work_s": work_s, "ranks": ranks}


def _score_rows(backend: Fsdp2Backend, table: pa.Table, shape: PackShape, model: str) -> pa.Table:
    rows: list[int] = []
    columns: dict[str, list[Any]] = {name: [] for name in SCORE_SCHEMA.names[2:]}
    rank, ranks = shape.place()
    steps = plan(pair_lengths([table]), shape, epochs=1, seed=0, ranks=ranks)[0]
    packs = [pack for step in steps for pack in step.for_rank(rank, ranks)]
    for _, batch in feed(packs, table, shape, backend.device):
        logps = backend.score_tokens(batch)
        real, generated = pair_logps(response_logps(logps, batch.segment, batch.num_segments), batch)
        rows += batch.pair_row.tolist()
        columns["real_logp"] += real.tolist()
        columns["generated_logp"] += generated.tolist()
        of_tokens, segment = logps.cpu(), batch.segment.cpu()  # one copy for all responses
        for name, segments in (("real", batch.real_segment), ("generated", batch.generated_segment)):
            columns[f"{name}_token_logps"] += [of_tokens[segment == number].tolist() for number in segments.tolist()]
    pair_ids = table["pair_id"].take(pa.array(rows, pa.int64()))
    return pa.table([pair_ids, [model] * len(rows), *columns.values()], schema=SCORE_SCHEMA)
