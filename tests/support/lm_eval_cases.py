"""Local lm-eval tasks, their rows, and their right results without lm-eval."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.config.recipe import SpinConfig
from spin_ray.loop.stages.evaluation import _accuracy, _grades
from spin_ray.report.uncertainty import conversation_groups
from spin_ray.run_dir.schemas import GENERATION_SCHEMA, PROMPT_SCHEMA
from tests.support.fakes import exchange

TASKS = Path(__file__).parent / "tasks"
SUMS = [
    {"prompt": f"2 + 2 = 4\n3 + 5 = 8\n10 + 4 = 14\n{a} + {b}", "answer": a + b}
    for a, b in [(1, 1), (7, 6), (12, 9), (48, 77), (3, 2), (365, 986), (20, 20), (517, 268)]
]
"""SmolLM2-135M gets some of these sums right and some wrong."""
CHOICES = [
    {"prompt": "The capital of France is", "endings": [" Paris", " Berlin", " Rome"], "right": 0},
    {"prompt": "Grass is", "endings": [" purple", " green", " made of glass"], "right": 1},
    {"prompt": "Two and two are", "endings": [" nine", " five", " four"], "right": 2},
    {"prompt": "The opposite of hot is", "endings": [" warm", " cold"], "right": 0},  # wrong on purpose
    {"prompt": "Cats like to eat", "endings": [" mice", " cars"], "right": 1},  # wrong on purpose
]


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    shutil.copy(TASKS / f"{name}.yaml", folder)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Plain:
    """A model without lm-eval: transformers, one prompt at a time, fp32."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def greedy(self, prompt: str, new_tokens: int = 8) -> list[int]:
        """Returns the greedy answer up to the end of its line."""
        ids = torch.tensor([self.ids(prompt)])
        out = self._model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.shape[1] :].tolist()
        line = self.tokenizer.decode(out).partition("\n")[0]
        return self.ids(line)

    @torch.no_grad()
    def choice(self, row: dict[str, Any]) -> int:
        start = len(self.ids(row["prompt"]))
        logps = []
        for ending in row["endings"]:
            ids = self.ids(row["prompt"] + ending)
            scores = self._model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            logps.append(scores.gather(1, torch.tensor(ids[start:])[:, None]).sum().item())
        return max(range(len(logps)), key=logps.__getitem__)

    def choice_accuracy(self) -> float:
        return sum(self.choice(row) == row["right"] for row in CHOICES) / len(CHOICES)

    def sum_accuracy(self, config: SpinConfig) -> float:
        """Returns the accuracy by our evaluation stage, on the same rows and greedy answers."""
        heldout = [
            {"prompt_id": str(number), "prompt_ids": self.ids(row["prompt"]), "real_ids": self.ids(str(row["answer"])),
             "messages": exchange(number), "answer_text": str(row["answer"])}
            for number, row in enumerate(SUMS)
        ]  # fmt: skip
        answers = [
            {"prompt_id": row["prompt_id"], "sample": 0, "opponent": "sft", "token_ids": self.greedy(SUMS[n]["prompt"]),
             "finish_reason": "stop", "seed": 0}
            for n, row in enumerate(heldout)
        ]  # fmt: skip
        tables = pa.Table.from_pylist(heldout, PROMPT_SCHEMA), pa.Table.from_pylist(answers, GENERATION_SCHEMA)
        return _accuracy(_grades(*tables, config, Path(self.folder)), conversation_groups(tables[0]))["answer_accuracy"]
