"""Win probabilities of SPPO from a preference model, one actor per replica."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray.exceptions
import torch

from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.config.sections import ResourcesConfig, ScorerConfig
from spin_ray.errors import StageError, last_line, memory_advice, user_error_in
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.inputs.template_variables import TemplateVariables
from spin_ray.loop.algorithms.sppo.preference_models import PreferenceScorer, load_scorer
from spin_ray.report.progress import StageProgress
from spin_ray.run_dir.artefact import Artefact, FileEntry, seal
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.runtime import cpu
from spin_ray.runtime.actors import map_by_actors
from spin_ray.runtime.waiting import wait_until_free, with_deadline

_USE_LESS = "lower scorer.max_length or scorer.replicas, or give each preference model more by scorer.resources"
PREFERENCE_SCHEMA = pa.schema(
    [pa.field("prompt_id", pa.string()), pa.field("sample", pa.int32()), pa.field("win", pa.float32())]
)
"""``win`` is the mean of P(response beats sample) over the prompt's samples, with 1/2 for itself."""


@dataclass(frozen=True, kw_only=True)
class PreferenceJob:
    prompts: Artefact
    generations: Artefact
    target: Artefact
    policy: ModelFolder
    trust_remote_code: bool
    scorer: ScorerConfig
    preference_model: ModelFolder
    variables: TemplateVariables
    fingerprint: str


def run(
    run_dir: RunDir, config: SpinConfig, iteration: int, preference_model: ModelFolder, policy: ModelFolder
) -> None:
    """Commits ``iter_NNN/preferences``.

    Raises:
        RunDirError: a part was made from other inputs.
        StageError: no model started, or none finished a part, in time.
    """
    assert config.scorer is not None
    generations, target = run_dir.generations(iteration), run_dir.preferences(iteration)
    inputs = {"generations": generations.manifest().digest, "scorer": preference_model.digest}
    settings: dict[str, Any] = {"kind": config.scorer.kind, "max_length": config.scorer.max_length}
    if config.model.chat_template_kwargs:
        settings["chat_template_kwargs"] = config.model.chat_template_kwargs
    if target.already_made(inputs, settings):
        return
    job = PreferenceJob(
        prompts=run_dir.prompts,
        generations=generations,
        target=target,
        policy=policy,
        trust_remote_code=config.model.trust_remote_code,
        scorer=config.scorer,
        preference_model=preference_model,
        variables=TemplateVariables(config.model.chat_template_kwargs, run_dir.date()),
        fingerprint=digest([inputs, settings]),
    )
    with run_dir.stage(target.path) as counted:
        parts = sorted(generations.manifest().files)
        found = target.find_parts(parts, job.fingerprint)
        entries, cut, compared = found.whole, 0, 0
        with StageProgress(target.path, len(parts), "parts", done=len(entries)) as progress:
            for row in _compare(job, found.missing, config):
                entries[row["name"]] = FileEntry(**row["entry"])
                cut += row["cut"]
                compared += row["entry"]["rows"]
                progress.advance(1, 0)
        counted |= {"rows": sum(entry.rows or 0 for entry in entries.values())}
        if found.damaged:
            counted["parts_damaged"] = found.damaged
        if cut:
            counted["responses_cut"] = cut
            run_dir.warn(
                target.path,
                f"{cut} of {compared} responses did not fit into scorer.max_length ({config.scorer.max_length}) with "
                "their prompts and were judged without the end; in another run, raise it if the preference model "
                "allows it",
            )
        target.commit(entries, inputs, settings)


def _compare(job: PreferenceJob, parts: list[str], config: SpinConfig) -> Any:
    if not parts:
        return
    limits = config.generation
    wait_until_free(config, "scorer", "the preference models")
    compared = map_by_actors(
        [{"name": name} for name in parts],
        _Comparing,
        (job,),
        job.scorer.resources,
        replicas=job.scorer.replicas,
        restarts=limits.max_failures,
    )
    first_s = limits.start_timeout_s + limits.shard_timeout_s
    try:
        yield from with_deadline(compared.iter_rows(), first_s, limits.shard_timeout_s, "a part of the preferences")
    except ray.exceptions.RayError as error:
        if found := user_error_in(error):
            raise found from error
        raise StageError(
            f"the preference model failed: {last_line(error)}{memory_advice(error, _USE_LESS)}; "
            "committed parts are kept, run the command again"
        ) from error


class _Comparing:
    """Actor with one preference model.

    The first part loads the model, because Ray takes an error in ``__init__`` for a dead actor and tries again.
    """

    def __init__(self, job: PreferenceJob) -> None:
        cpu.prepare(job.scorer.resources.threads)
        self._job = job

    @cached_property
    def _scorer(self) -> PreferenceScorer:
        job = self._job
        return load_scorer(job.scorer, job.preference_model.here(), device_of(job.scorer.resources), job.variables)

    @cached_property
    def _tokenizer(self) -> Any:
        folder = str(self._job.policy.here(weights=False))
        return load_tokenizer(folder, trust_remote_code=self._job.trust_remote_code)

    @cached_property
    def _messages(self) -> dict[str, str]:
        return {
            row["prompt_id"]: row["messages"]
            for table in self._job.prompts.tables()
            for row in table.select(["prompt_id", "messages"]).to_pylist()
        }

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        name = item["name"]
        answers = self._job.generations.read_part(name, self._job.generations.manifest().files[name])
        texts = self._tokenizer.batch_decode(answers["token_ids"].to_pylist(), skip_special_tokens=True)
        cut_before = self._scorer.cut
        table = win_table(answers, texts, self._messages, self._scorer)
        return {
            "name": name,
            "cut": self._scorer.cut - cut_before,
            "entry": self._job.target.write_part(name, seal(table, self._job.fingerprint)).model_dump(),
        }


def device_of(resources: ResourcesConfig) -> torch.device:
    """Returns the actor's device. Ray hides the other GPUs."""
    return torch.device("cuda" if resources.gpus else "cpu")


def win_table(answers: pa.Table, texts: list[str], messages: dict[str, str], scorer: PreferenceScorer) -> pa.Table:
    """Returns PREFERENCE_SCHEMA rows in the order of ``answers``.

    Args:
        messages: JSON conversations by prompt id; the last message is left out.
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
