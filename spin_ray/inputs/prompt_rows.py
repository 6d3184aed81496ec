"""Source rows -> prompt rows, checked and tokenised, without Ray."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import islice
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, Self

from spin_ray.config.algorithms import facts_of
from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import OWN_TEMPLATE_VARIABLES, DataConfig
from spin_ray.inputs.conversations import Conversation, Found, Unusable, question_of, read_row
from spin_ray.inputs.forms import MEDIA, ignored_in
from spin_ray.inputs.graders import answer_text
from spin_ray.inputs.held_out import Part, part_of
from spin_ray.inputs.messages import Tools, decoded, refuse_surrogates
from spin_ray.inputs.rendering import ChatRenderer, Rendered, RenderError, load_tokenizer
from spin_ray.inputs.sources import SourceRow
from spin_ray.inputs.vocabulary import vocabulary_of, without_embedding

Row = dict[str, Any]
"""Columns of ``PROMPT_SCHEMA``."""
Note = Callable[[SourceRow, Found, list[str]], None]
"""Callback for a usable row and its unread columns."""
_PLACEHOLDERS = ("<image>", "<video>", "<audio>", "<|image|>", "<image_placeholder>")


@dataclass(frozen=True)
class PromptTask:
    """Settings that turn source rows into prompt rows."""

    tokenizer: str
    """Folder of the model."""
    chat_template: str | None
    trust_remote_code: bool
    max_length: int
    data: DataConfig
    labelled: bool = True
    """False if rows are questions, whose responses are not read."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: datetime | None = None
    """The run's date, for templates."""
    takes_tools: bool = True
    """False if rows with tools are refused."""
    needs_rejected: bool = False
    """True if rows without a rejected response are refused."""
    part: Part | None = None
    """Part of the data that rows are made of, by ``data.heldout_fraction``; None: all."""

    @classmethod
    def of(
        cls,
        config: SpinConfig,
        tokenizer: str,
        *,
        labelled: bool = True,
        trained: bool = False,
        date: datetime | None = None,
    ) -> Self:
        """Returns the task of a recipe; ``trained`` for rows of ``data.train``."""
        facts = facts_of(config.algorithm)
        part: Part | None = None
        if config.data.heldout_fraction and labelled:
            part = "trained" if trained else "held out"
        return cls(
            tokenizer=tokenizer,
            chat_template=config.model.chat_template,
            trust_remote_code=config.model.trust_remote_code,
            max_length=config.model.max_length,
            data=config.data,
            labelled=labelled,
            chat_template_kwargs=config.model.chat_template_kwargs,
            date=date,
            takes_tools=facts.takes_tools,
            needs_rejected=trained and facts.rejected,
            part=part,
        )

    @cached_property
    def renderer(self) -> ChatRenderer:
        tokenizer = load_tokenizer(self.tokenizer, self.chat_template, self.trust_remote_code)
        return ChatRenderer(tokenizer, self.chat_template_kwargs, self.date)

    @cached_property
    def without_embedding(self) -> dict[int, str]:
        """Tokens that the model does not embed."""
        return without_embedding(self.renderer.tokenizer, vocabulary_of(Path(self.tokenizer)))

    def prepared(self) -> Self:
        """Loads the tokenizer now, so that copies in other processes need not."""
        _ = self.renderer, self.without_embedding
        return self

    def render(self, conversations: list[Conversation], tools: list[Tools]) -> list[Rendered | RenderError]:
        """Renders conversations; of questions, the prompts."""
        if self.labelled:
            return self.renderer.render_all(conversations, tools)
        prompts = self.renderer.render_prompts([messages[:-1] for messages in conversations], tools)
        return [ids if isinstance(ids, RenderError) else Rendered(ids, []) for ids in prompts]


def rows_of(sources: Sequence[SourceRow], task: PromptTask, note: Note | None = None) -> Iterator[list[Row] | Unusable]:
    """Yields each source row's prompt rows, or why the row is unusable; no prompt rows for a row of the other part."""
    found = [_found_in(source, task) for source in sources]
    usable = [conversation for each in found if isinstance(each, Found) for conversation in each.all]
    tools = [each.tools for each in found if isinstance(each, Found) for _ in each.all]
    rendered = iter(task.render(usable, tools))
    for source, each in zip(sources, found, strict=True):
        if not isinstance(each, Found):
            yield each or []
            continue
        results = [
            result if has_end else _without_end(result)
            for result, has_end in zip(islice(rendered, len(each.all)), each.has_end, strict=True)
        ]
        rejected = results.pop() if each.rejected else None
        of_each = [*[None] * (len(results) - 1), rejected]  # it answers the last prompt alone
        try:
            rows = [
                _row(each, conversation, result, worse, task)
                for conversation, result, worse in zip(each.ending_with_real, results, of_each, strict=True)
            ]
        except Unusable as unusable:  # one unusable turn refuses the whole row
            yield unusable
            continue
        if note:
            note(source, each, _unread(source, each, task))
        yield rows


def _without_end(rendered: Rendered | RenderError) -> Rendered | RenderError:
    """Takes the end of turn away, as from generated responses that were cut."""
    return rendered if isinstance(rendered, RenderError) else Rendered(rendered.prompt_ids, rendered.real_ids[:-1])


def _found_in(source: SourceRow, task: PromptTask) -> Found | Unusable | None:
    """Reads a row; returns None for one of the other part. A row that cannot be read counts as trained."""
    mine = task.part != "held out"
    if source.content is None:
        return Unusable("malformed", source.fault) if mine else None
    try:
        if task.labelled:
            found = read_row(source.content, task.data, source.unread)
        else:
            found = question_of(source.content, task.data)
        if task.part and task.data.heldout_fraction:
            mine = part_of(found.ending_with_real[0], task.data.heldout_fraction) == task.part
            if not mine:
                return None
        if found.tools and not task.takes_tools:
            raise Unusable("tools", "seft and sdft write prompts again, which would have no tools")
        _refuse_media(source, found)
        _refuse_own_variables(found, task)
        return _of_pair(found) if task.needs_rejected else found
    except Unusable as unusable:
        return unusable if mine else None


def _of_pair(found: Found) -> Found:
    if found.rejected is None:
        raise Unusable("no_rejected", "has no rejected response, which algorithm dpo needs beside chosen")
    return found._replace(ending_with_real=found.ending_with_real[-1:])


def _refuse_media(source: SourceRow, found: Found) -> None:
    filled = (name for name, value in (source.content or {}).items() if value)
    has = [name for name in (*filled, *source.unread) if name in MEDIA]
    if not has:
        return
    for message in (message for conversation in found.all for message in conversation):
        if mark := next((mark for mark in _PLACEHOLDERS if mark in message["content"]), None):
            raise Unusable("media", f"its text has {mark}, and the model reads text alone (column {has[0]})")


def _refuse_own_variables(found: Found, task: PromptTask) -> None:
    given = decoded(found.row.get("chat_template_kwargs"))
    if not isinstance(given, dict):
        return
    given = {name: value for name, value in given.items() if value is not None and name not in OWN_TEMPLATE_VARIABLES}
    changes = task.renderer.template.changed_by(found.all[-1], found.tools, given)
    if changes is not None:
        said = json.dumps({changes: given[changes]}, ensure_ascii=False, default=str)[1:-1]
        raise Unusable(
            "template",
            f"its chat_template_kwargs has {said if len(said) < 80 else changes}, with which the chat template writes "
            "it otherwise; the rows of a run share model.chat_template_kwargs: train on those that agree with it",
        )


def _unread(source: SourceRow, found: Found, task: PromptTask) -> list[str]:
    if found.form is None:  # a question
        return []
    names = [*ignored_in(found.row, found.form), *source.unread]
    if found.goes_on:
        names.append(f"{found.form.needs[0]} after the last response")
    messages = found.ending_with_real[-1]
    for message in messages:
        if len(message) > 2:
            left = task.renderer.template.leaves_out(messages)
            return list(dict.fromkeys([*names, *(f"{found.form.needs[0]}.{key}" for key in left)]))
    return names


def _row(
    found: Found,
    conversation: Conversation,
    rendered: Rendered | RenderError,
    rejected: Rendered | RenderError | None,
    task: PromptTask,
) -> Row:
    for each in (rendered, rejected):
        if isinstance(each, RenderError):
            raise Unusable("template", str(each))
        length = len(each.prompt_ids) + max(1, len(each.real_ids)) if each else 0  # a response has at least one token
        if length > task.max_length:
            raise Unusable("too_long", f"{length} tokens, model.max_length is {task.max_length}")
        if each is not None and task.without_embedding:
            for token_id in [*each.prompt_ids, *each.real_ids]:
                if token_id in task.without_embedding:
                    name = task.without_embedding[token_id]
                    raise Unusable("vocabulary", f"the model has no embedding for {name} (id {token_id})")
    assert isinstance(rendered, Rendered) and not isinstance(rejected, RenderError)
    refuse_surrogates(answer := answer_text(found.row.get("answer")), "answer")
    identity = [rendered.prompt_ids, rendered.real_ids, *([rejected.real_ids] if rejected else [])]
    return {
        "prompt_id": hashlib.blake2b(str(identity).encode(), digest_size=8).hexdigest(),
        "prompt_ids": rendered.prompt_ids,
        "real_ids": rendered.real_ids,
        "messages": _as_json(conversation),
        "rejected_ids": rejected.real_ids if rejected else None,
        "answer_text": answer,
        "conversation_id": found.conversation_id,
    }


def _as_json(conversation: Conversation) -> str:
    """Returns ``json.dumps(conversation, ensure_ascii=False)``, mostly in half the time."""
    if any(len(message) != 2 or not isinstance(message["content"], str) for message in conversation):
        return json.dumps(conversation, ensure_ascii=False)
    written = [
        f'{{"role": {encode_basestring(message["role"])}, "content": {encode_basestring(message["content"])}}}'
        for message in conversation
    ]
    return f"[{', '.join(written)}]"
