"""A run folder with everything that a report shows, written without a run."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa

from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import ChatRenderer, load_tokenizer
from spin_ray.report.margins import SCORE_SCHEMA
from spin_ray.report.uncertainty import ROW_SCHEMA
from spin_ray.run_dir.events import fields_of
from spin_ray.run_dir.names import iterate_name
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import GENERATION_SCHEMA, PAIR_SCHEMA, PROMPT_SCHEMA
from spin_ray.run_dir.storage import Storage, bytes_digest, table_to_bytes
from tests.support.fakes import config_of, generation_rows, write_rows

TINY = resolve("embedded:tiny-llama")
TOKENIZER = load_tokenizer(TINY)
MARGINS = {"p0": 2.0, "p1": -1.5, "p2": 0.5}
TOPICS = ["tea", "coffee", "<script>alert(1)</script>"]


def made_up_run(folder: Path, *, iterations: int = 2, done: int = 2, **sections: Any) -> RunDir:
    """Writes ``done`` of ``iterations`` iterations, with answers to three held-out prompts each."""
    config = config_of(
        data={"train": "d.jsonl", "heldout": "h.jsonl"}, iterations=iterations, objective={"beta": 0.5}, **sections
    )
    run = RunDir(Storage(folder))
    facts = {"inputs": {"model": "a" * 64, "data": "b" * 64, "heldout": "c" * 64}, "start_model": TINY}
    run.begin(config, facts | {"versions": {"python": "3.11", "ray": "2.60.0"}})
    _write_heldout(run)
    run.storage.replace(
        "quarantine/prompts.parquet",
        table_to_bytes(pa.table({"reason": ["empty", "empty", "duplicate"], "detail": ["no text", "", "of row 3"]})),
    )
    for iterate in range(done + 1):
        _write_iterate(run, iterate)
        run.publish(iterate)
    _write_events(run, done)
    return run


def _write_heldout(run: RunDir) -> None:
    rows = []
    for number, topic in enumerate(TOPICS):
        messages = [{"role": "user", "content": f"Do you like {topic}?"}, {"role": "assistant", "content": "I do."}]
        rendered = ChatRenderer(TOKENIZER).render(messages)
        rows.append(
            {"prompt_id": f"p{number}", "prompt_ids": rendered.prompt_ids, "real_ids": rendered.real_ids,
             "messages": json.dumps(messages)}
        )  # fmt: skip
    write_rows(run.heldout, PROMPT_SCHEMA, rows, part_rows=2)


def _write_iterate(run: RunDir, iterate: int) -> None:
    name = iterate_name(iterate)
    answers = [
        (prompt, 0, [*TOKENIZER.encode(f"answer {number} of {name}", add_special_tokens=False), 2])
        for number, prompt in enumerate(MARGINS)
    ]
    write_rows(run.heldout_samples(iterate), GENERATION_SCHEMA, generation_rows(answers), part_rows=9)
    content = table_to_bytes(pa.Table.from_pylist(_measures(iterate), ROW_SCHEMA))
    run.storage.replace(run.heldout_rows_path(iterate), content)
    evaluation: dict[str, Any] = {
        "iterate": name, "heldout_rows": bytes_digest(content).sha256, "rows": 3, "conversations": 3,
        "real_length": 5.0, "generated_length": 9.0 - iterate, "length_auc": 0.4,
        "truncation_rate": 0.0, "identical_share": 0.0, "answer_accuracy": 0.25 + iterate / 10, "answers_graded": 3,
        "conversations_graded": 3,
        "standard_errors": {"answer_accuracy": 0.02},
    }  # fmt: skip
    if iterate:
        against = {"loss": 0.6 - iterate / 20, "margin": 0.4, "accuracy": 0.7, "generated_logp_drift": -0.5}
        evaluation |= {
            "opponent": iterate_name(iterate - 1), "beta": 0.5, "length_normalised": False, "real_logp_drift": 0.1,
            "against_opponent": against,
            "against_self": against | {"generated_logp_drift": 0.3}, "jsd_lower_bound": (math.log(2) - 0.6) / 2,
            "kl_to_base": 0.3 * iterate,
        }  # fmt: skip
        write_rows(run.artefact(f"{name}/heldout_scores"), SCORE_SCHEMA, _scores(name, evaluation["opponent"]), 99)
        steps = [
            {"step": step, "loss": math.log(2) / (step + 1), "margin": step / 4, "accuracy": min(step / 4, 1.0),
             "real_logp": -20.0, "generated_logp": -20.0 - step, "grad_norm": 3.0, "lr": 1e-6, "tokens": 90, "of": 5}
            for step in range(5)
        ]  # fmt: skip
        log = "".join(json.dumps(line) + "\n" for line in steps)
        run.storage.replace(f"{name}/train_log.jsonl", log.encode())
        row = {"pair_id": "p0/000/0", "prompt_id": "p0", "iteration": 0, "prompt_ids": [1], "real_ids": [2],
               "generated_ids": [3]}  # fmt: skip
        pairs = run.pairs(iterate - 1)
        part = pairs.write_part("part-00000.parquet", pa.Table.from_pylist([row], PAIR_SCHEMA))
        counts = {"rows": 1.0, "dropped_identical": 7.0, "dropped_empty": 0.0, "from_earlier": 0.0}
        pairs.commit({"part-00000.parquet": part}, {}, {}, counts)
    run.storage.replace(run.eval_path(iterate), json.dumps(evaluation).encode())


def _scores(name: str, opponent: str) -> list[dict[str, Any]]:
    """Returns scores whose margins at β = ½ are ``MARGINS``: y gained twice the margin, y′ stayed."""
    return [
        {"pair_id": f"{prompt}/{whose}", "model": model, "real_logp": gained, "generated_logp": -9.0}
        for prompt, margin in MARGINS.items()
        for whose in ("self", "opponent")
        for model, gained in ((name, 2 * margin), (opponent, 0.0))
    ]


def _measures(iterate: int) -> list[dict[str, Any]]:
    """Returns ROW_SCHEMA rows whose means are those of the evaluation."""
    accuracy = 0.25 + iterate / 10
    return [
        {"prompt_id": prompt, "conversation": number, "answer_accuracy": accuracy, "truncation_rate": 0.0,
         "generated_length": 9.0 - iterate}
        for number, prompt in enumerate(MARGINS)
    ]  # fmt: skip


def _write_events(run: RunDir, done: int) -> None:
    run.storage.delete("events.jsonl")
    clock = 1_795_000_000.0
    stages = ["prompts", "heldout"]
    for iterate in range(done + 1):
        stages += [f"{iterate_name(iterate)}/training"] if iterate else []
        stages += [f"{iterate_name(iterate)}/heldout_samples", f"{iterate_name(iterate)}/evaluation"]
    for number, stage in enumerate(stages):
        seconds = 10.0 + number
        commit = {"event": "commit", "seconds": seconds, "rows": 3, "tokens": 50} | fields_of(stage)
        lines = [{"time": clock, "event": "start"} | fields_of(stage), {"time": clock + seconds} | commit]
        for line in lines:
            run.storage.append("events.jsonl", json.dumps(line) + "\n")
        clock += seconds + 1
