"""Pairs of a run and votes of its arena as preference rows for other trainers, in TRL's or ShareGPT's form."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from spin_ray.config.paths import is_remote, local_path
from spin_ray.config.sections import ModelConfig
from spin_ray.errors import ConfigError, ModelError, RunDirError, writing
from spin_ray.inputs.ends import other_ends
from spin_ray.inputs.forms import FINISH_REASONS
from spin_ray.inputs.messages import Conversation, Message
from spin_ray.inputs.rendering import ChatRenderer, Rendered, open_renderer
from spin_ray.report.export import HUB
from spin_ray.report.history import find_iterate, model_path
from spin_ray.run_dir.run_dir import RunDir

RowForm = Literal["trl", "sharegpt"]
_AT_A_TIME = 256
_SPEAKERS = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system", "developer": "system"}


class Preferred(NamedTuple):
    prompt: Conversation
    chosen: Message
    rejected: Message
    beside: Mapping[str, Any] = MappingProxyType({})
    """Further columns."""
    variables: Mapping[str, Any] = MappingProxyType({})
    """Variables of the chat template, ``model.chat_template_kwargs``."""


def pairs_of(run: RunDir, iterate: str, counts: Counter[str], form: RowForm = "trl") -> Iterator[Preferred]:
    """Yields the pairs that an iterate was trained on.

    Args:
        counts: gets ``other ids``, the responses whose text gives other token ids than the pair has. The tokenizer may
            split a sampled text otherwise, and a response cut at ``max_tokens`` gets an end from trainers that do not
            read its finish reason, which is ``length``.
        form: form of the rows, without whose columns no reader can know the template's variables.

    Raises:
        RunDirError: the iterate was not trained on pairs.
    """
    number = find_iterate(run, iterate)
    made = run.pairs(number - 1) if number else None
    if made is None or not made.is_committed:
        raise RunDirError(f"{run.storage.root}: {iterate} was not trained on pairs")
    config = run.config()
    folder = model_path(run, number)
    renderer = open_renderer(str(folder), config.model, run.date())
    variables = config.model.chat_template_kwargs
    known = config.model.model_copy(update={"chat_template_kwargs": variables if form == "trl" else {}})
    reader = _Reader(
        renderer, _open_as_others(folder, known), {renderer.end_of_turn_id, *other_ends(folder, renderer)}, counts
    )
    conversations = _conversations(run)
    for table in made.tables():
        for start in range(0, table.num_rows, _AT_A_TIME):
            rows = table.slice(start, _AT_A_TIME).to_pylist()
            if not all(row["generated_ids"] for row in rows):
                raise RunDirError(f"{made.path}: holds rows without y′, which are no pairs")
            yield from (pair._replace(variables=variables) for pair in reader.read(rows, conversations))


def _open_as_others(folder: Path, model: ModelConfig) -> ChatRenderer | None:
    """Returns the renderer of another trainer, which writes today's date; None if it cannot write."""
    try:
        return open_renderer(str(folder), model)
    except ModelError:
        return None


def _conversations(run: RunDir) -> dict[str, tuple[str, list[int]]]:
    """Returns the conversation as JSON, and its response's ids, by prompt id."""
    return {
        row["prompt_id"]: (row["messages"], row["real_ids"])
        for prompts in (run.prompts, run.questions)
        if prompts.is_committed
        for table in prompts.tables()
        for row in table.select(["prompt_id", "messages", "real_ids"]).to_pylist()
    }


class _Reader:
    def __init__(
        self, renderer: ChatRenderer, others: ChatRenderer | None, ends: set[int], counts: Counter[str]
    ) -> None:
        self._renderer, self._others, self._ends, self._counts = renderer, others, ends, counts

    def read(self, rows: list[dict[str, Any]], conversations: dict[str, tuple[str, list[int]]]) -> list[Preferred]:
        found, ids = [], []
        for row in rows:
            stored, real_ids = conversations[row["prompt_id"]]
            messages = json.loads(stored)
            own = messages[-1] if row["real_ids"] == real_ids else self._message(row["real_ids"])
            beside = {
                column: "stop" if row[ids][-1] in self._ends else "length"
                for column, ids in (
                    (FINISH_REASONS["chosen"], "real_ids"),
                    (FINISH_REASONS["rejected"], "generated_ids"),
                )
            }
            found.append(Preferred(messages[:-1], own, self._message(row["generated_ids"]), beside))
            ids += [row["prompt_ids"] + row["real_ids"], row["prompt_ids"] + row["generated_ids"]]
        written = [[*row.prompt, response] for row in found for response in (row.chosen, row.rejected)]
        made = self._others.render_all(written, [None] * len(written)) if self._others else [None] * len(written)
        for rendered, expected in zip(made, ids, strict=True):
            same = isinstance(rendered, Rendered) and rendered.prompt_ids + rendered.real_ids == expected
            self._counts["other ids"] += not same
        self._counts["responses"] += len(written)
        return found

    def _message(self, token_ids: list[int]) -> Message:
        text_ids = token_ids[:-1] if token_ids and token_ids[-1] in self._ends else token_ids
        return {"role": "assistant", "content": self._renderer.tokenizer.decode(text_ids, skip_special_tokens=True)}


def preferred_of_votes(
    votes: Iterable[dict[str, Any]], counts: Counter[str], variables: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[Preferred]:
    """Yields the arena's votes, whose ``chosen`` and ``rejected`` are whole conversations.

    Args:
        counts: gets ``identical``, the votes between equal answers. They are left out, as they teach nothing.
        variables: those of the chat template by which the run is served.
    """
    for vote in votes:
        beside = {name: value for name, value in vote.items() if name not in ("chosen", "rejected", "identical")}
        if vote["identical"]:
            counts["identical"] += 1
        else:
            yield Preferred(vote["chosen"][:-1], vote["chosen"][-1], vote["rejected"][-1], beside, variables)


def write_rows(rows: Iterable[Preferred], form: RowForm, target: str, counts: Counter[str]) -> str:
    """Writes JSON lines to a new file; returns its path.

    Args:
        counts: gets ``written`` and ``left out``. ShareGPT's form cannot hold thoughts or several tool calls.

    Raises:
        ConfigError: the file exists, cannot be written, or would have no row.
    """
    if is_remote(target) or target.startswith(HUB):
        raise ConfigError(f"--to {target}: is no file of this machine; write rows to one, and copy that")
    path = local_path(target)
    part = path.with_name(f"{path.name}.part")
    with writing(path):
        if path.exists():
            raise ConfigError(f"{path}: exists; give another file by --to")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("w", encoding="utf-8") as file:
                for row in rows:
                    made = as_trl(row) if form == "trl" else as_sharegpt(row)
                    counts["left out" if made is None else "written"] += 1
                    if made is not None:
                        file.write(json.dumps({**made, **row.beside}, ensure_ascii=False) + "\n")
            if not counts["written"]:
                raise ConfigError(f"{path}: there is nothing to write: {said(counts)}")
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
    return str(path)


def said(counts: Counter[str]) -> str:
    """Returns a line about what was written and what differs."""
    line = f"{counts['written']} rows written"
    if counts["left out"]:
        line += f"; {counts['left out']} left out: ShareGPT's form has no place for thoughts or several tool calls"
    if counts["identical"]:
        line += f"; {counts['identical']} left out: chosen and rejected are identical"
    if counts["other ids"]:
        line += (
            f"; {counts['other ids']} of {counts['responses']} responses have other token ids when their text is "
            "tokenised again: samples that the tokenizer splits otherwise, that were cut, or prompts with tools, the "
            "date, or template variables that the form cannot hold"
        )
    return line


def as_trl(row: Preferred) -> dict[str, Any]:
    """Returns TRL's conversational preference row with an explicit prompt, and the chat template's variables if any."""
    own = {"chat_template_kwargs": dict(row.variables)} if row.variables else {}
    return {"prompt": row.prompt, "chosen": [row.chosen], "rejected": [row.rejected], **own}


def as_sharegpt(row: Preferred) -> dict[str, Any] | None:
    """Returns a row for LLaMA-Factory (``ranking: true``); None if the form cannot hold it."""
    spoken = [_spoken(message) for message in (*row.prompt, row.chosen, row.rejected)]
    turns = [message for message in spoken if message is not None]
    if len(turns) < len(spoken):
        return None
    *before, chosen, rejected = turns
    found: dict[str, Any] = {"conversations": before, "chosen": chosen, "rejected": rejected}
    if before[0]["from"] == "system":
        found |= {"conversations": before[1:], "system": before[0]["value"]}
    return found


def _spoken(message: Message) -> dict[str, str] | None:
    if message.keys() == {"role", "content"}:
        return {"from": _SPEAKERS[message["role"]], "value": message["content"]}
    calls = message.get("tool_calls", [])
    if message.keys() == {"role", "content", "tool_calls"} and len(calls) == 1 and not message["content"]:
        return {"from": "function_call", "value": json.dumps(calls[0].get("function", calls[0]), ensure_ascii=False)}
    return None
