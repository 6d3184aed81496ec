"""Training rows, prompts and revisions of SEFT's reviser."""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.conversations import Conversation
from spin_ray.inputs.rendering import ChatRenderer, Rendered, RenderError
from spin_ray.run_dir.artefact import Artefact, digests
from spin_ray.run_dir.names import answer_id, part_name, revision_id
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA, PROMPT_SCHEMA

LABELS = ("[keep]", "[minor]", "[major]")
Row = dict[str, Any]


def reviser_prompt(conversation: Conversation, answer: str) -> Conversation:
    asked = "\n".join(message["content"] for message in conversation[:-1] if message["content"])
    return [{"role": "user", "content": f"Question:\n{asked}\n\nAnswer:\n{answer}\n\nRevise: {', '.join(LABELS)}"}]


def shortest_prompts(renderer: ChatRenderer, conversations: Iterable[str]) -> list[int]:
    """Returns the tokens of the reviser's prompts for empty answers, of conversations as JSON text."""
    prompts = renderer.render_prompts([reviser_prompt(json.loads(each), "") for each in conversations])
    return [len(ids) for ids in prompts if not isinstance(ids, RenderError)]


def label_of(answer: list[int], human: list[int], minor_from: float) -> str:
    """Returns the label of a revision from ``answer`` to ``human``, by token similarity."""
    if answer == human:
        return LABELS[0]
    similarity = difflib.SequenceMatcher(a=answer, b=human, autojunk=False).ratio()
    return LABELS[1] if similarity >= minor_from else LABELS[2]


def parse(text: str) -> tuple[str, str] | None:
    """Splits the reviser's text into label and revision.

    Returns None without a label, or if no revision follows [minor] or [major]. A revision starts with no label.
    """
    label, _, revision = text.strip().partition("\n")
    label, revision = label.strip(), revision.strip()
    if label not in LABELS or (label != LABELS[0] and (not revision or revision.startswith(LABELS))):
        return None
    return label, revision


def training_rows(
    run_dir: RunDir, config: SpinConfig, renderer: ChatRenderer, answers: Artefact, target: Artefact
) -> None:
    """Commits the reviser's training rows, made from θ_0's answers."""
    assert config.reviser is not None
    minor_from = config.reviser.minor_from
    inputs = digests(run_dir.prompts, answers)
    settings = {"minor_from": minor_from, "max_length": config.model.max_length}
    if target.already_made(inputs, settings):
        return

    def row(prompt: Row, answer: Row, text: str) -> Row | str:
        conversation = json.loads(prompt["messages"])
        label = label_of(answer["token_ids"], prompt["real_ids"], minor_from)
        revision = "" if label == LABELS[0] else conversation[-1]["content"]
        written = {"role": "assistant", "content": f"{label}\n{revision}"}
        try:
            rendered = renderer.render([*reviser_prompt(conversation, text), written])
        except RenderError:
            return "template"
        if len(rendered.prompt_ids) + len(rendered.real_ids) > config.model.max_length:
            return "too_long"
        return _fine_tuning_row(answer_id(answer["prompt_id"], answer["sample"]), 0, rendered)

    with run_dir.stage(target.path) as counted:
        rows = [row(*found) for found in _answered(run_dir.prompts, answers, renderer)]
        counted |= _commit(target, rows, PAIR_SCHEMA, inputs, settings)


def revision_prompts(
    run_dir: RunDir,
    config: SpinConfig,
    renderer: ChatRenderer,
    prompts: Artefact,
    answers: Artefact,
    target: Artefact,
) -> None:
    """Commits the reviser's prompts, with the answers to revise as ``real_ids``."""
    inputs = digests(prompts, answers)
    settings = {"max_length": config.model.max_length}
    if target.already_made(inputs, settings):
        return

    def row(prompt: Row, answer: Row, text: str) -> Row | str:
        if answer["finish_reason"] != "stop":
            return "answer_cut"
        try:
            prompt_ids = renderer.render_prompt(reviser_prompt(json.loads(prompt["messages"]), text))
        except RenderError:
            return "template"
        if len(prompt_ids) + config.generation.sampling.max_tokens > config.model.max_length:
            return "too_long"
        return {
            "prompt_id": answer_id(answer["prompt_id"], answer["sample"]), "prompt_ids": prompt_ids,
            "real_ids": answer["token_ids"], "messages": prompt["messages"],
        }  # fmt: skip

    with run_dir.stage(target.path) as counted:
        rows = [row(*found) for found in _answered(prompts, answers, renderer)]
        counted |= _commit(target, rows, PROMPT_SCHEMA, inputs, settings)


def revised_rows(
    renderer: ChatRenderer,
    asked: Artefact,
    revisions: Artefact,
    iteration: int,
    max_length: int,
    dropped: Counter[str],
) -> Iterator[pa.Table]:
    """Yields PAIR_SCHEMA rows without y′, and counts unusable revisions by reason in ``dropped``."""

    def row(prompt: Row, written: Row, text: str) -> Row | str:
        found = parse(text)
        if written["finish_reason"] != "stop" or found is None:
            return "no_label" if found is None else "revision_cut"
        label, revised = found
        question = json.loads(prompt["messages"])[:-1]
        try:
            if label == LABELS[0]:
                rendered = Rendered(renderer.render_prompt(question), prompt["real_ids"])
            else:
                rendered = renderer.render([*question, {"role": "assistant", "content": revised}])
        except RenderError:
            return "template"
        if len(rendered.prompt_ids) + len(rendered.real_ids) > max_length:
            return "too_long"
        return _fine_tuning_row(answer_id(prompt["prompt_id"], written["sample"]), iteration, rendered)

    kept, reasons = _split(row(*found) for found in _answered(asked, revisions, renderer))
    dropped.update(reasons)
    yield pa.Table.from_pylist(kept, PAIR_SCHEMA)


def _fine_tuning_row(prompt_id: str, iteration: int, rendered: Rendered) -> Row:
    return {
        "pair_id": revision_id(prompt_id, iteration), "prompt_id": prompt_id, "iteration": iteration,
        "prompt_ids": rendered.prompt_ids, "real_ids": rendered.real_ids, "generated_ids": [],
    }  # fmt: skip


def _answered(prompts: Artefact, answers: Artefact, renderer: ChatRenderer) -> Iterator[tuple[Row, Row, str]]:
    of = {row["prompt_id"]: row for table in prompts.tables() for row in table.to_pylist()}
    for table in answers.tables():
        texts = renderer.tokenizer.batch_decode(table["token_ids"].to_pylist(), skip_special_tokens=True)
        for answer, text in zip(table.to_pylist(), texts, strict=True):
            yield of[answer["prompt_id"]], answer, text


def _split(rows: Iterable[Row | str]) -> tuple[list[Row], Counter[str]]:
    """Returns the rows, and the number of those that are reasons in place of rows."""
    kept, dropped = list[Row](), Counter[str]()
    for row in rows:
        if isinstance(row, str):
            dropped[row] += 1
        else:
            kept.append(row)
    return kept, dropped


def _commit(
    target: Artefact, rows: list[Row | str], schema: pa.Schema, inputs: dict[str, str], settings: dict[str, Any]
) -> dict[str, int]:
    kept, dropped = _split(rows)
    counts = {f"dropped_{reason}": count for reason, count in dropped.items()}
    entry = target.replace_part(part_name(0), pa.Table.from_pylist(kept, schema))
    target.commit({part_name(0): entry}, inputs, settings, counts=dict(counts))
    return {"rows": len(kept), **counts}
