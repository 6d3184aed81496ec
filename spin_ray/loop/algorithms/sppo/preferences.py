"""SPPO's own stage: which of θ_t's samples of a prompt beat its others, by a preference model.

generations of t -> parts still missing -> Ray Data -> [judge actor] x replicas -> one part for each, committed alone
"""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions

from spin_ray.config.sections import ScorerConfig, SpinConfig, digest
from spin_ray.errors import StageError, last_line
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.loop.algorithms.sppo.preference_models import PreferenceScorer, load_scorer
from spin_ray.report.progress import StageProgress
from spin_ray.run_dir.artefact import Artefact, FileEntry, seal
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.runtime import cpu
from spin_ray.runtime.resources import with_deadline

PREFERENCE_SCHEMA = pa.schema(
    [pa.field("prompt_id", pa.string()), pa.field("sample", pa.int32()), pa.field("win", pa.float32())]
)
"""``win``: mean over the prompt's samples, itself included (1/2), of P(this response beats that one)."""


@dataclass(frozen=True, kw_only=True)
class PreferenceJob:
    """Everything an actor needs."""

    prompts: Artefact
    generations: Artefact
    target: Artefact
    policy: ModelFolder
    """Whose responses they are."""
    trust_remote_code: bool
    scorer: ScorerConfig
    judge: ModelFolder
    fingerprint: str


def run(run_dir: RunDir, config: SpinConfig, iteration: int, judge: ModelFolder, policy: ModelFolder) -> None:
    """Makes ``iter_NNN/preferences``.

    Raises:
        RunDirError: parts of another preference model or of other generations are in the way.
        StageError: no judge came up, or none finished a part, within the times of generation.
    """
    assert config.scorer is not None
    generations, target = run_dir.generations(iteration), run_dir.preferences(iteration)
    inputs = {"generations": generations.manifest().digest, "scorer": judge.digest}
    settings = {"kind": config.scorer.kind, "max_length": config.scorer.max_length}
    if target.already_made(inputs, settings):
        return
    job = PreferenceJob(
        prompts=run_dir.prompts,
        generations=generations,
        target=target,
        policy=policy,
        trust_remote_code=config.model.trust_remote_code,
        scorer=config.scorer,
        judge=judge,
        fingerprint=digest([inputs, settings]),
    )
    with run_dir.stage(target.path) as counted:
        parts = sorted(generations.manifest().files)
        found = target.find_parts(parts, job.fingerprint)
        entries = found.whole
        with StageProgress(target.path, len(parts), "parts", done=len(entries)) as progress:
            for row in _judge(job, found.missing, config):
                entries[row["name"]] = FileEntry(**row["entry"])
                progress.advance(1, 0)
        counted |= {"rows": sum(entry.rows or 0 for entry in entries.values())}
        if found.damaged:
            counted["parts_damaged"] = found.damaged
        target.commit(entries, inputs, settings)


def _judge(job: PreferenceJob, parts: list[str], config: SpinConfig) -> Any:
    if not parts:
        return
    resources = job.scorer.resources
    judged = ray.data.from_items([{"name": name} for name in parts], override_num_blocks=len(parts)).map(
        _Judge,  # pyrefly: ignore[bad-argument-type] (an actor class; Ray annotates functions only)
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(size=min(job.scorer.replicas, len(parts))),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
        resources=resources.custom or None,
        label_selector=resources.labels or None,
    )
    limits = config.generation
    first_s = limits.start_timeout_s + limits.shard_timeout_s
    try:
        yield from with_deadline(judged.iter_rows(), first_s, limits.shard_timeout_s, "a part of the preferences")
    except ray.exceptions.RayError as error:
        raise StageError(
            f"the preference model failed: {last_line(error)}; committed parts are kept, run the command again"
        ) from error


class _Judge:
    """Actor: one preference model."""

    def __init__(self, job: PreferenceJob) -> None:
        cpu.prepare(job.scorer.resources.threads)
        self._job = job
        self._scorer = load_scorer(job.scorer, job.judge.here())
        self._tokenizer = load_tokenizer(str(job.policy.here(weights=False)), trust_remote_code=job.trust_remote_code)
        self._messages = {
            row["prompt_id"]: row["messages"]
            for table in job.prompts.tables()
            for row in table.select(["prompt_id", "messages"]).to_pylist()
        }

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        name = item["name"]
        answers = self._job.generations.read_part(name, self._job.generations.manifest().files[name])
        texts = self._tokenizer.batch_decode(answers["token_ids"].to_pylist(), skip_special_tokens=True)
        table = win_table(answers, texts, self._messages, self._scorer)
        return {
            "name": name,
            "entry": self._job.target.write_part(name, seal(table, self._job.fingerprint)).model_dump(),
        }


def win_table(answers: pa.Table, texts: list[str], messages: dict[str, str], scorer: PreferenceScorer) -> pa.Table:
    """PREFERENCE_SCHEMA rows of GENERATION_SCHEMA ones, in their order.

    Args:
        texts: the responses, decoded.
        messages: JSON text of each prompt's conversation, which ends with people's response: that is left out.
    """
    groups: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(answers["prompt_id"].to_pylist()):
        groups.setdefault(prompt_id, []).append(row)
    wins = [0.0] * answers.num_rows
    for prompt_id, rows in groups.items():
        beats = scorer.wins(json.loads(messages[prompt_id])[:-1], [texts[row] for row in rows])
        for row, win in zip(rows, beats.mean(dim=1).tolist(), strict=True):
            wins[row] = win
    return pa.table([answers["prompt_id"], answers["sample"], wins], schema=PREFERENCE_SCHEMA)
