"""What a run recorded, read back for people: evaluations, training logs, examples.

Reads committed artefacts and logs only, so it works while the run goes on and after it stopped half-way.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from spin_ray.config.sections import SpinConfig
from spin_ray.errors import RunDirError
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.report.margins import row_margins
from spin_ray.report.measures import Evaluation, stop_evidence
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.names import SELF, is_iterate_name, is_sample_of, iterate_name, iterate_number, prompt_of
from spin_ray.run_dir.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Example:
    """A held-out prompt with people's response and every iterate's."""

    prompt_id: str
    messages: list[dict[str, str]]
    human: str
    answers: dict[str, str]
    """By iterate, ``sft`` first."""
    margins: dict[str, float] = field(default_factory=dict)
    """Of the iterate's own fresh sample against its opponent, where it was scored."""


def read_evaluations(run: RunDir, config: SpinConfig) -> list[Evaluation]:
    """What the evaluation stage wrote of every iterate that it saw, θ_0 first."""
    return [found for _, found in _eval_files(run, config) if "real_length" in found]


def read_benchmarks(run: RunDir, config: SpinConfig) -> dict[str, dict[str, Any]]:
    """lm-eval's results by task, of every iterate that has any."""
    return {name: found["benchmarks"] for name, found in _eval_files(run, config) if "benchmarks" in found}


def _eval_files(run: RunDir, config: SpinConfig) -> Iterator[tuple[str, Evaluation]]:
    """``eval.json`` of every iterate that has one; a damaged one is none: the run makes it again."""
    for iterate in range(config.iterations + 1):
        if found := run.evaluation(iterate):
            yield iterate_name(iterate), found


def evidence_to_stop(config: SpinConfig, evaluations: list[Evaluation]) -> dict[str, Any] | None:
    """Why ``stop_when`` ends the run after the last of ``evaluations``; None to go on."""
    rule = config.stop_when
    return stop_evidence(evaluations, rule.patience, rule.min_fall) if rule else None


def read_train_logs(run: RunDir, config: SpinConfig) -> dict[str, list[dict[str, Any]]]:
    """Lines of ``train_log.jsonl`` by folder, those that have any."""
    names = [iterate_name(iterate) for iterate in range(config.iterations + 1)]
    logs = {name: read_json_lines(run.storage, f"{name}/train_log.jsonl") for name in names}
    return {name: log for name, log in logs.items() if log}


def read_examples(
    run: RunDir, config: SpinConfig, *, limit: int, spread: bool = False, only: list[str] | None = None
) -> list[Example]:
    """Up to ``limit`` held-out rows with the first sample of each iterate that has answered them.

    ``spread``: evenly over the order of the last iterate's margins, largest first, its extremes included; without
    margins, and otherwise, the first rows. ``only`` keeps these prompt ids, in their order.
    """
    samples = {
        name: _first_samples(artefact)
        for name, artefact in ((iterate_name(it), run.heldout_samples(it)) for it in range(config.iterations + 1))
        if artefact.is_committed
    }
    if not run.heldout.is_committed or not samples:
        return []
    rows = pa.concat_tables(list(run.heldout.tables())).select(["prompt_id", "messages"])
    margins = {name: found for name in samples if (found := _own_margins(run, config, name))}
    if only is not None:
        rows = rows.take(pc.drop_null(pc.index_in(pa.array(only, pa.string()), value_set=rows["prompt_id"])))
    else:
        picked = _pick_rows(rows["prompt_id"].to_pylist(), list(margins.values())[-1:] if spread else [], limit)
        rows = rows.take(pa.array(picked, pa.int64()))
    tokenizer = _tokenizer(run, config)
    prompt_ids = rows["prompt_id"].to_pylist()
    texts = {}
    for name, table in samples.items():
        ids = dict(zip(table["prompt_id"].to_pylist(), table["token_ids"].to_pylist(), strict=True))
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
        )
        for prompt_id, messages in zip(prompt_ids, map(json.loads, rows["messages"].to_pylist()), strict=True)
    ]


def find_iterate(run: RunDir, iterate: str) -> int:
    """The iterate that the command line means; a bare number t is θ_t, the result of t iterations.

    Raises:
        RunDirError: there is no such iterate (yet); the message names those that are there.
    """
    name = (run.latest() or "") if iterate == "latest" else iterate
    number = -1
    if name.isdecimal() or is_iterate_name(name):
        number = int(name) if name.isdecimal() else iterate_number(name)
    if not 0 <= number <= run.config().iterations or (number and not run.model(number).is_committed):
        there = [iterate_name(n) for n in range(run.config().iterations + 1) if run.model(n).is_committed]
        raise RunDirError(f"{run.storage.root}: has no iterate {iterate}; it has {', '.join(there) or 'none yet'}")
    return number


def model_path(run: RunDir, iterate: int) -> Path:
    """The folder of θ_iterate: θ_0 without a warm-up is the start model itself."""
    model = run.model(iterate)
    return model.local_folder() if model.is_committed else Path(run.description()["start_model"])


def _first_samples(samples: Artefact) -> pa.Table:
    table = pa.concat_tables(list(samples.tables()))
    return table.filter(pc.equal(table["sample"], 0))


def _own_margins(run: RunDir, config: SpinConfig, name: str) -> dict[str, float]:
    """Margin of each held-out row with the iterate's own sample, by prompt id; empty if it was not scored."""
    scores = run.artefact(f"{name}/heldout_scores")
    evaluation = run.evaluation(iterate_number(name))
    if name == "sft" or not scores.is_committed or evaluation is None:
        return {}
    frame = row_margins(pa.concat_tables(list(scores.tables())), name, evaluation["opponent"], evaluation["beta"])[
        "margin"
    ]
    return {prompt_of(str(key)): float(margin) for key, margin in frame.items() if is_sample_of(str(key), SELF)}


def _pick_rows(prompt_ids: list[str], margins: list[dict[str, float]], limit: int) -> list[int]:
    order = list(range(len(prompt_ids)))
    if margins:
        order.sort(key=lambda row: -margins[0].get(prompt_ids[row], -np.inf))
        return [order[place] for place in np.unique(np.linspace(0, len(order) - 1, min(limit, len(order))).astype(int))]
    return order[:limit]


def _tokenizer(run: RunDir, config: SpinConfig) -> Tokenizer:
    """That of an iterate where there is one, as the start model may be elsewhere by now.

    Without transformers if that can be: its import takes longer than all else that is printed.
    """
    models = [run.model(iterate) for iterate in range(config.iterations + 1)]
    trained = [model for model in models if model.is_committed]
    folder = trained[0].local_folder() if trained else Path(run.description()["start_model"])
    file = folder / "tokenizer.json"
    if file.exists():
        return Tokenizer.from_file(str(file))
    return load_tokenizer(str(folder), trust_remote_code=config.model.trust_remote_code).backend_tokenizer
