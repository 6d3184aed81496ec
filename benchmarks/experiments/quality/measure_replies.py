"""Measures an iterate on conversations: replies at several temperatures, their likeness to people's, log p(y).

    python benchmarks/experiments/quality/measure_replies.py --model FOLDER --rows test=FILE --out FILE.json

Samples of all models use the same uniform numbers (row, token).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import likeness
import torch
from arms import json_lines
from measure import BATCH, SEED, answer_batch
from transformers import AutoModelForCausalLM

from spin_ray.config.sections import DataConfig
from spin_ray.inputs.conversations import conversations_of
from spin_ray.inputs.rendering import ChatRenderer, Rendered, load_tokenizer
from spin_ray.runtime import cpu

EXAMPLES = 5


def measure(
    model: Any,
    renderer: ChatRenderer,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    longest: int,
    temperatures: list[float],
) -> dict[str, Any]:
    """Returns measures of rows with ``messages`` and ``conversation``; ``at`` has those of each temperature."""
    data = DataConfig(train="", system="")
    rendered = renderer.render_all([conversations_of(row, data)[0] for row in rows])
    usable = [each for each in rendered if isinstance(each, Rendered)]
    assert len(usable) == len(rows), "a row that cannot be rendered"
    conversations = [row["conversation_id"] for row in rows]
    real = [each.real_ids for each in usable]
    people = _texts(tokenizer, real)
    found: dict[str, Any] = {
        "conversations": len(set(conversations)),
        "self_bleu": likeness.self_bleu(people),
        "at": {},
    }
    of_temperatures, logps = replies(model, usable, longest, renderer.end_of_turn_id, temperatures)
    found |= {"real_logp": [round(logp, 3) for logp in logps], "real_tokens": [len(ids) for ids in real]}
    for temperature, answers in zip(temperatures, of_temperatures, strict=True):
        texts = _texts(tokenizer, answers)
        found["at"][f"{temperature:g}"] = {
            **likeness.likeness(people, texts, conversations),
            **likeness.tokens(real, answers, renderer.end_of_turn_id),
            "examples": texts[:EXAMPLES],
        }
    return found


def replies(
    model: Any, rows: list[Rendered], longest: int, stop: int, temperatures: list[float]
) -> tuple[list[list[list[int]]], list[float]]:
    """Returns a sample for each temperature and row, and log p(y). Temperatures share uniform numbers."""
    uniform = torch.rand(len(rows), 1, longest, generator=torch.Generator("cpu").manual_seed(SEED), device="cpu")
    uniform = uniform.expand(-1, len(temperatures), -1)
    answers: list[list[list[int]]] = [[[] for _ in rows] for _ in temperatures]
    logps = [0.0] * len(rows)
    for chosen in _batches(rows):
        found, real = answer_batch(
            model, [rows[i] for i in chosen], uniform[chosen].to(model.device), stop, torch.tensor(temperatures),
            greedy=False,
        )  # fmt: skip
        for row, of_row, logp in zip(chosen, found, real, strict=True):
            logps[row] = logp
            for number, answer in enumerate(of_row):
                answers[number][row] = answer
    return answers, logps


def _texts(tokenizer: Any, replies: list[list[int]]) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(replies, skip_special_tokens=True)]


def _batches(rows: list[Rendered]) -> list[list[int]]:
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].prompt_ids))
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", required=True, help="NAME=FILE.jsonl")
    parser.add_argument("--longest", type=int, default=48, help="tokens of a reply")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 0.85, 1.0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    cpu.prepare(options.threads)
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    tokenizer = load_tokenizer(str(options.model))
    renderer = ChatRenderer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="in_groups")
    model.to(options.device)
    found = {}
    for each in options.rows:
        name, _, file = each.partition("=")
        rows = [json.loads(line) for line in json_lines(Path(file))]
        found[name] = measure(model, renderer, tokenizer, rows, options.longest, options.temperatures)
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
