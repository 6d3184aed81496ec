"""The probe before iteration 0: is there anything left to learn from θ_0's responses?

The texts of θ_0's responses are compared with the human ones. Then a short iteration of SPIN and an SFT on the same
rows are compared on held-out rows. RUN/probe keeps all but the models.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.config.sections import ObjectiveConfig, ProbeConfig
from spin_ray.inputs.model_folder import ModelFolder, open_artefact
from spin_ray.inputs.rendering import tokenizer_of
from spin_ray.learner.step import Objective
from spin_ray.loop import scoring
from spin_ray.loop.algorithms.base import margin_objective, pair_table
from spin_ray.loop.stages import evaluation, pairs
from spin_ray.loop.stages.generation.shards import Job, prompt_slice
from spin_ray.loop.stages.training import stage as training
from spin_ray.report.discriminator import ngram_features, two_sample
from spin_ray.report.margins import row_margins
from spin_ray.report.probe import PROBE, Evidence, asked_of, decide, margin_evidence, read_probe
from spin_ray.report.responses import row_measures, text_measures
from spin_ray.report.uncertainty import conversation_groups, standard_errors
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.names import OPPONENT, part_name
from spin_ray.run_dir.run_dir import RunDir

FOLDER = "probe"
SPIN_MODEL, SFT_MODEL = "probe_spin", "probe_sft"
"""Names of the two trained models in scores."""
MADE_FROM = f"{FOLDER}/made_from.json"
Play = Callable[[SpinConfig, ModelFolder, list[Job]], None]
"""Function that lets a model answer jobs, with the settings of a recipe."""


class _ProbeDir(RunDir):
    """The probe's folder within the run, with the run's storage and lease."""

    def __init__(self, run: RunDir, folder: str) -> None:
        super().__init__(run.storage)
        self._folder = folder

    def artefact(self, path: str) -> Artefact:
        return super().artefact(f"{self._folder}/{path}")


@dataclass(frozen=True)
class _Probe:
    spin: _ProbeDir
    sft: _ProbeDir
    """Folder of the SFT that SPIN is compared with."""
    config: SpinConfig
    initial: ModelFolder

    @property
    def answers(self) -> Artefact:
        return self.spin.generations(0)

    @property
    def heldout_answers(self) -> Artefact:
        return self.spin.heldout_samples(0)


def run(run_dir: RunDir, config: SpinConfig, initial: ModelFolder, play: Play) -> dict[str, Any]:
    """Returns probe.json, made anew unless its inputs and settings are the same. ``initial`` is θ_0."""
    settings = config.probe or ProbeConfig()
    recipe = _recipe(config, settings)
    made_from = _made_from(run_dir, recipe, settings, initial)
    found = read_probe(run_dir)
    if found and found["made_from"] == made_from:
        return found
    if run_dir.storage.find(MADE_FROM) != made_from.encode():
        run_dir.storage.delete(FOLDER)
        run_dir.storage.replace(MADE_FROM, made_from.encode())
    probe = _Probe(_ProbeDir(run_dir, FOLDER), _ProbeDir(run_dir, f"{FOLDER}/more_sft"), recipe, initial)
    _take_rows(run_dir, probe.spin, settings, config.seed)
    jobs = [
        Job(probe.spin.heldout, probe.heldout_answers, initial),
        Job(probe.spin.prompts, probe.answers, initial, audit=probe.spin.audit_path(0)),
    ]
    play(recipe, initial, jobs)
    evidence = _from_texts(probe) | _from_training(probe, settings)
    evidence["heldout_is_train"] = not run_dir.heldout.is_committed
    found = {**decide(evidence), "evidence": evidence, "settings": asked_of(settings), "made_from": made_from}
    for where in (probe.spin, probe.sft):
        run_dir.storage.delete(where.model(1).path)
    run_dir.storage.replace(PROBE, json.dumps(found, indent=1).encode())
    return found


def _recipe(config: SpinConfig, settings: ProbeConfig) -> SpinConfig:
    """Returns the recipe of the trainings: small batches, the logistic loss alone.

    Limits of training are off, because a probe that overshoots is a finding.
    """
    first = config.at(0)
    train = {
        "epochs": settings.epochs,
        "schedule_epochs": None,
        "learning_rate": settings.learning_rate or first.learning_rate,
        "global_batch_pairs": min(settings.global_batch_pairs, config.train.global_batch_pairs),
    }
    off = dict.fromkeys(("max_loss", "max_margin", "max_real_logp_drop", "max_length_change"))
    return config.with_train(**train).model_copy(
        update={
            "objective": ObjectiveConfig(
                beta=first.beta, window=1, length_normalised=config.objective.length_normalised
            ),
            "generation": config.generation.model_copy(update={"samples_per_prompt": 1}),
            "health": config.health.model_copy(update=off),
        }
    )


def _made_from(run_dir: RunDir, recipe: SpinConfig, settings: ProbeConfig, initial: ModelFolder) -> str:
    heldout = run_dir.heldout.manifest().digest if run_dir.heldout.is_committed else None
    train = [recipe.at(0).learning_rate, recipe.at(0).epochs, recipe.at(0).beta]
    asked = asked_of(settings)
    return digest([initial.digest, run_dir.prompts.manifest().digest, heldout, recipe.identity(), train, asked])


def _take_rows(run_dir: RunDir, probe: RunDir, settings: ProbeConfig, seed: int) -> None:
    """Commits rows to train on and rows to measure on. Without held-out data both are training rows."""
    train = _rows(run_dir.prompts, settings.prompts, seed)
    if run_dir.heldout.is_committed:
        half = train.num_rows // 2
        trained, measured = train.slice(0, half), _rows(run_dir.heldout, settings.prompts - half, seed)
    else:
        trained, measured = halves_of(train)
    for target, rows in ((probe.prompts, trained), (probe.heldout, measured)):
        if not target.is_committed:
            target.discard_parts()
            entry = target.write_part(part_name(0), rows.combine_chunks())
            target.commit({part_name(0): entry}, {}, {})


def halves_of(rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Returns about two halves of PROMPT_SCHEMA rows, in their order.

    A conversation is in one of them, unless there is no other.
    """
    groups = conversation_groups(rows)
    numbers = np.array([groups[prompt_id] for prompt_id in rows["prompt_id"].to_pylist()])
    rows = rows.take(pa.array(np.argsort(numbers, kind="stable")))
    numbers.sort()
    middle = len(numbers) // 2
    begins = [number for number in range(1, len(numbers)) if numbers[number] != numbers[number - 1]]
    cut = min(begins, key=lambda begin: abs(begin - middle), default=middle)
    return rows.slice(0, cut), rows.slice(cut)


def _rows(prompts: Artefact, wanted: int, seed: int) -> pa.Table:
    """Returns ``wanted`` rows in a seeded order. They are iteration 0's rows if it plays as many."""
    rows, start, taken = prompt_slice(prompts.manifest().rows, wanted, 0, seed), 0, []
    for table in prompts.tables():
        numbers = np.arange(start, start + table.num_rows)
        mine = numbers if rows is None else np.intersect1d(rows, numbers)
        taken.append(table.take(pa.array(mine - start, pa.int64())))
        start += table.num_rows
    found = pa.concat_tables(taken)
    return found.take(pa.array(np.random.default_rng([seed, 0x50]).permutation(found.num_rows)))


def _from_texts(probe: _Probe) -> Evidence:
    both = [
        evaluation.read_answers(probe.spin.prompts, probe.answers),
        evaluation.read_answers(probe.spin.heldout, probe.heldout_answers),
    ]
    rows, answers = (pa.concat_tables(tables) for tables in zip(*both, strict=True))
    tokenizer = tokenizer_of(probe.initial.here(weights=False), probe.config.model)
    texts = [
        tokenizer.batch_decode(column.to_pylist(), skip_special_tokens=True)
        for column in (rows["real_ids"], answers["token_ids"])
    ]
    real, generated = (ngram_features(each) for each in texts)
    groups = conversation_groups(rows)
    found = two_sample(real, generated, [groups[prompt_id] for prompt_id in rows["prompt_id"].to_pylist()])
    measures = text_measures(rows, answers, row_measures(rows, answers), groups)
    return measures | {"rows": rows.num_rows, "ngrams": found.as_json() if found else None}


def _from_training(probe: _Probe, settings: ProbeConfig) -> Evidence:
    """Returns measures of both trainings, None where pairs are too few for a step."""
    evidence: Evidence = dict.fromkeys(("loss", "margin", "accuracy", "real_logp_drift", "jsd_lower_bound", "sft_gain"))
    trained = {}
    if _pairs_left(probe) >= probe.config.train.global_batch_pairs:
        pairs.run(probe.spin, probe.config, 0)
        trained[SPIN_MODEL] = _train(probe, probe.spin, margin_objective(probe.config, 0))
    prompts = probe.spin.prompts
    if settings.sft and prompts.manifest().rows >= probe.config.train.global_batch_pairs:
        tables = (pair_table(table, 0, None) for table in prompts.tables())
        fresh = pairs.Fresh(tables, {"prompts": prompts.manifest().digest}, {}, paired=False)
        pairs.make(probe.sft, probe.config, 0, fresh)
        trained[SFT_MODEL] = _train(probe, probe.sft, Objective(loss=None))
    if not trained:
        return evidence | {"standard_errors": {}}
    scores = _scores(probe, [*trained.values(), probe.initial])
    beta, errors = probe.config.at(0).beta, {}
    groups = conversation_groups(pa.concat_tables(list(probe.spin.heldout.tables())))
    if SPIN_MODEL in trained:
        per_token = probe.config.objective.length_normalised
        frame = row_margins(scores, SPIN_MODEL, probe.initial.name, beta, per_token=per_token)
        evidence |= margin_evidence(frame["margin"], frame["real"], groups)
        errors |= evidence["standard_errors"]
    if SFT_MODEL in trained:
        gain = row_margins(scores, SFT_MODEL, probe.initial.name, beta)["real"]
        evidence["sft_gain"] = float(gain.mean())
        errors |= standard_errors({"sft_gain": gain}, groups)
    return evidence | {"standard_errors": errors}


def _pairs_left(probe: _Probe) -> int:
    rows, answers = evaluation.read_answers(probe.spin.prompts, probe.answers)
    both = zip(rows["real_ids"].to_pylist(), answers["token_ids"].to_pylist(), strict=True)
    return sum(bool(generated) and generated != real for real, generated in both)


def _train(probe: _Probe, where: _ProbeDir, objective: Objective) -> ModelFolder:
    training.run(where, probe.config, 0, probe.initial, objective)
    return open_artefact(where.model(1), SFT_MODEL if where is probe.sft else SPIN_MODEL, probe.initial)


def _scores(probe: _Probe, models: list[ModelFolder]) -> pa.Table:
    rows = evaluation.pair_rows(*evaluation.read_answers(probe.spin.heldout, probe.heldout_answers), OPPONENT)
    inputs = {f"model_{number}": model.digest for number, model in enumerate(models)}
    inputs["samples"] = probe.heldout_answers.manifest().digest
    tables = tuple((model, rows) for model in models)
    target = probe.spin.artefact("heldout_scores")
    return scoring.score(probe.spin, probe.config, target, tables, inputs, stage=target.path)[0]
