"""Self-distillation fine-tuning, SDFT (arXiv 2601.19897)."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import SdftConfig
from spin_ray.inputs.conversations import Conversation
from spin_ray.inputs.rendering import ChatRenderer, RenderError, open_renderer
from spin_ray.learner.step import Objective
from spin_ray.loop.algorithms.base import Algorithm, Turn, refuse_no_room, shortest_rows
from spin_ray.loop.stages import pairs
from spin_ray.planning.work import IterationWork, Trees, Work, played_rows
from spin_ray.run_dir.artefact import Artefact, digests
from spin_ray.run_dir.names import answer_id, part_name, prompt_of, sample_of
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA, pairs_of

CHARACTERS_OF_A_TOKEN = 4
"""Characters of an English token, an assumption of the plan."""


class Sdft(Algorithm):
    """KL(policy ‖ teacher) at each token of y′ ~ θ_t. The teacher is θ_t with the human response in its prompt."""

    reads = ("sdft",)
    objective_fields = ("beta",)
    backend_methods = ("read",)
    makes_teacher_rows = True

    def costs(self, config: SpinConfig, work: Work, iteration: int) -> IterationWork:
        played = played_rows(config, work)
        words = re.sub(r"\{prompt\}|\{response\}", "", _settings(config).demonstration)
        shown = work.prompt + work.real + len(words) / CHARACTERS_OF_A_TOKEN
        own, teacher = (
            Trees(count=played * config.generation.samples_per_prompt, prompt=prompt, responses=(work.generated,))
            for prompt in (work.prompt, shown)
        )
        return IterationWork(answered=played, trained=own, scored=(teacher,))

    def check_rows(self, run: RunDir, config: SpinConfig) -> None:
        """Raises DataError if no teacher's prompt of short rows leaves room for a response."""
        renderer = open_renderer(run.description()["start_model"], config.model, run.date())
        prompts = _prompts_of_teacher([shortest_rows(run.prompts)], renderer, _settings(config).demonstration)
        refuse_no_room([len(ids) for ids in prompts.values() if not isinstance(ids, str)], config, "sdft.demonstration")

    def plays(self, run: RunDir) -> Artefact:
        return run.prompts

    def make_pairs(self, turn: Turn) -> None:
        """Commits ``teacher_rows`` (y′ after the teacher's prompts) and pairs (the same y′ after θ_t's prompts)."""
        run, iteration = turn.run, turn.iteration
        demonstrated = run.teacher_rows(iteration)
        _make_teacher_rows(turn, demonstrated)
        sources = {"prompts": run.prompts, "generations": run.generations(iteration), "teacher_rows": demonstrated}
        inputs = {name: artefact.manifest().digest for name, artefact in sources.items()}
        own = _own_rows(turn, demonstrated)
        fresh = pairs.Fresh(own, inputs, {}, paired=False, dropped_before=demonstrated)
        pairs.make(run, turn.config, iteration, fresh)

    def objective(self, config: SpinConfig, iteration: int) -> Objective:
        return Objective(loss=None, top_k=_settings(config).top_k)


def demonstrated(conversation: Conversation, response: str, template: str) -> Conversation | None:
    """Returns the prompt with ``response`` in the last user message, or None without a user message."""
    asked = [number for number, message in enumerate(conversation[:-1]) if message["role"] == "user"]
    if not asked:
        return None
    values = {"{prompt}": conversation[asked[-1]]["content"] or "", "{response}": response}
    shown = re.sub(r"\{prompt\}|\{response\}", lambda found: values[found[0]], template)  # values may hold placeholders
    message = conversation[asked[-1]] | {"content": shown}
    return [*conversation[: asked[-1]], message, *conversation[asked[-1] + 1 : -1]]


def _settings(config: SpinConfig) -> SdftConfig:
    return config.sdft or SdftConfig()


def _make_teacher_rows(turn: Turn, target: Artefact) -> None:
    run, config, iteration = turn.run, turn.config, turn.iteration
    generations, template = run.generations(iteration), _settings(config).demonstration
    inputs = digests(run.prompts, generations)
    settings: dict[str, Any] = {"demonstration": template, "max_length": config.model.max_length}
    if target.already_made(inputs, settings):
        return
    renderer = open_renderer(str(turn.start.model.path), config.model, run.date())
    with run.stage(target.path) as counted:
        played = pa.concat_tables(table.select(["prompt_id"]) for table in generations.tables())["prompt_id"].unique()
        tables = (table.filter(pc.is_in(table["prompt_id"], value_set=played)) for table in run.prompts.tables())
        prompts = _prompts_of_teacher(tables, renderer, template)
        dropped, entries = Counter[str](), {}
        target.discard_parts()
        for table in pairs.joined(run.prompts, generations, iteration):
            rows = _behind(prompts, _learnt(table, iteration), config.model.max_length, dropped)
            name = part_name(len(entries))
            entries[name] = target.write_part(name, rows)
        counts = {f"dropped_{reason}": float(count) for reason, count in dropped.items()}
        manifest = target.commit(entries, inputs, settings, counts=counts)
        counted |= {"rows": manifest.rows, **{name: int(count) for name, count in counts.items()}}


def _prompts_of_teacher(
    tables: Iterable[pa.Table], renderer: ChatRenderer, template: str
) -> dict[str, list[int] | str]:
    """Returns the teacher's prompt by prompt id, or the reason why there is none."""
    found: dict[str, list[int] | str] = {}
    for table in tables:
        if not table.num_rows:  # batch_decode would return one text for no rows
            continue
        responses = renderer.tokenizer.batch_decode(table["real_ids"].to_pylist(), skip_special_tokens=True)
        shown = [
            demonstrated(json.loads(messages), response.strip(), template)
            for messages, response in zip(table["messages"].to_pylist(), responses, strict=True)
        ]
        rendered = iter(renderer.render_prompts([prompt for prompt in shown if prompt is not None]))
        for prompt_id, prompt in zip(table["prompt_id"].to_pylist(), shown, strict=True):
            ids = "no_question" if prompt is None else next(rendered)
            found[prompt_id] = "template" if isinstance(ids, RenderError) else ids
    return found


def _learnt(played: pa.Table, iteration: int) -> pa.Table:
    """Returns rows with y′ as ``real_ids``. Each has its own prompt id, that of the answer."""
    pair_ids = played["pair_id"].to_pylist()
    ids = [
        answer_id(prompt_id, sample_of(pair_id))
        for prompt_id, pair_id in zip(played["prompt_id"].to_pylist(), pair_ids, strict=True)
    ]
    return pairs_of(pair_ids, iteration, ids, played["prompt_ids"], played["generated_ids"])


def _behind(prompts: dict[str, list[int] | str], learnt: pa.Table, longest: int, dropped: Counter[str]) -> pa.Table:
    kept, shown = [], []
    for row, (prompt_id, response) in enumerate(
        zip(learnt["prompt_id"].to_pylist(), learnt["real_ids"].to_pylist(), strict=True)
    ):
        prompt = prompts[prompt_of(prompt_id)]
        if isinstance(prompt, str):
            dropped[prompt] += 1
        elif not response:
            dropped["empty"] += 1
        elif len(prompt) + len(response) > longest:
            dropped["too_long"] += 1
        else:
            kept.append(row)
            shown.append(prompt)
    field = PAIR_SCHEMA.field("prompt_ids")
    return learnt.take(pa.array(kept, pa.int64())).set_column(3, field, pa.array(shown, field.type))


def _own_rows(turn: Turn, demonstrated: Artefact) -> Iterator[pa.Table]:
    played = pairs.joined(turn.run.prompts, turn.run.generations(turn.iteration), turn.iteration)
    for table, shown in zip(played, demonstrated.tables(), strict=True):
        rows = table.filter(pc.is_in(table["pair_id"], value_set=shown["pair_id"].combine_chunks()))
        yield _learnt(rows, turn.iteration)
