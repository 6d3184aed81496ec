"""Held-out prompts with all responses, from committed artefacts only."""

import json
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import RunDirError, first_line
from spin_ray.inputs.rendering import tokenizer_of
from spin_ray.inputs.start_model import start_folder
from spin_ray.report.history import read_evaluation
from spin_ray.report.margins import row_margins
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.names import SELF, is_sample_of, iterate_name, iterate_number, prompt_of
from spin_ray.run_dir.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Example:
    prompt_id: str
    messages: list[dict[str, str]]
    human: str
    answers: dict[str, str]
    """Responses by iterate, ``sft`` first."""
    margins: dict[str, float] = field(default_factory=dict)
    """Margins of own samples by iterate, where scored."""
    cut: set[str] = field(default_factory=set)
    """Iterates whose response reached the limit before it ended."""


def read_examples(
    run: RunDir,
    config: SpinConfig,
    *,
    limit: int,
    spread: bool = False,
    only: list[str] | None = None,
    to_read: bool = False,
) -> list[Example]:
    """Returns held-out rows with each iterate's first sample.

    Args:
        spread: picks rows evenly by the last iterate's margin, largest first. Default: the first rows.
        only: picks these prompt ids, in their order.
        to_read: takes the answers at ``evaluation.examples_temperature``, not the measured ones.
    """
    samples = {
        name: _first_samples(artefact)
        for name, artefact in (
            (iterate_name(it), run.examples(it) if to_read else run.heldout_samples(it))
            for it in range(config.iterations + 1)
        )
        if artefact.is_committed
    }
    if not run.heldout.is_committed or not samples:
        return []
    rows = pa.concat_tables(list(run.heldout.tables())).select(["prompt_id", "messages"])
    margins = {name: found for name in samples if (found := _own_margins(run, name))}
    if only is not None:
        rows = rows.take(pc.drop_null(pc.index_in(pa.array(only, pa.string()), value_set=rows["prompt_id"])))
    else:
        picked = _pick_rows(rows["prompt_id"].to_pylist(), list(margins.values())[-1:] if spread else [], limit)
        rows = rows.take(pa.array(picked, pa.int64()))
    tokenizer = _tokenizer(run, config)
    prompt_ids = rows["prompt_id"].to_pylist()
    texts, cut = {}, {}
    for name, table in samples.items():
        ids = dict(zip(table["prompt_id"].to_pylist(), table["token_ids"].to_pylist(), strict=True))
        reasons = zip(table["prompt_id"].to_pylist(), table["finish_reason"].to_pylist(), strict=True)
        cut[name] = {prompt_id for prompt_id, reason in reasons if reason == "length"}
        answered = [prompt_id for prompt_id in prompt_ids if prompt_id in ids]
        decoded = tokenizer.decode_batch([ids[prompt_id] for prompt_id in answered], skip_special_tokens=True)
        texts[name] = dict(zip(answered, decoded, strict=True))
    return [
        Example(
            prompt_id=prompt_id,
            messages=messages[:-1],
            human=messages[-1]["content"],
            answers={name: by_prompt[prompt_id] for name, by_prompt in texts.items() if prompt_id in by_prompt},
            margins={name: by_prompt[prompt_id] for name, by_prompt in margins.items() if prompt_id in by_prompt},
            cut={name for name, prompts in cut.items() if prompt_id in prompts},
        )
        for prompt_id, messages in zip(prompt_ids, map(json.loads, rows["messages"].to_pylist()), strict=True)
    ]


def _first_samples(samples: Artefact) -> pa.Table:
    table = pa.concat_tables(list(samples.tables()))
    return table.filter(pc.equal(table["sample"], 0))


def _own_margins(run: RunDir, name: str) -> dict[str, float]:
    scores = run.artefact(f"{name}/heldout_scores")
    evaluation = read_evaluation(run, iterate_number(name))
    if name == "sft" or not scores.is_committed or evaluation is None:
        return {}
    table, per_token = pa.concat_tables(list(scores.tables())), evaluation["length_normalised"]
    rows = row_margins(table, name, evaluation["opponent"], evaluation["beta"], per_token=per_token)
    margins = rows["margin"].items()
    return {prompt_of(str(key)): float(margin) for key, margin in margins if is_sample_of(str(key), SELF)}


def _pick_rows(prompt_ids: list[str], margins: list[dict[str, float]], limit: int) -> list[int]:
    order = list(range(len(prompt_ids)))
    if margins:
        order.sort(key=lambda row: -margins[0].get(prompt_ids[row], -np.inf))
        return [order[place] for place in np.unique(np.linspace(0, len(order) - 1, min(limit, len(order))).astype(int))]
    return order[:limit]


def _tokenizer(run: RunDir, config: SpinConfig) -> Tokenizer:
    """Returns an iterate's tokenizer if possible, as the start model may have been moved.

    Avoids transformers, whose import is slow, where tokenizer.json exists.
    """
    models = [run.model(iterate) for iterate in range(config.iterations + 1)]
    trained = [model for model in models if model.is_committed]
    folder = trained[0].local_folder(weights=False) if trained else start_folder(run, weights=False)
    file = folder / "tokenizer.json"
    if file.exists():
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare one
            raise RunDirError(f"{file}: cannot be read ({first_line(error)}); restore it") from error
    return tokenizer_of(folder, config.model).backend_tokenizer
