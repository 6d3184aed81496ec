"""Side of the iteration benchmark: SPIN as its authors ran it, from the published description. A turn is one iteration.

transformers' ``generate`` pads batches on the left. A training step pads each response with its own copy of the prompt,
computes the logits of all positions, asks a second, frozen model for the reference, and recomputes activations.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from harness import MODEL, THREADS, replies, side_options, timed
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.inputs.embedded import resolve

GENERATE_ROWS, TRAIN_PAIRS = 16, 8
BETA = 0.1


def main() -> None:
    parser = side_options(__doc__)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows, authors = json.loads(options.pairs.read_text()), Authors(options)
    answer, turns = replies(options.reply)
    with torch.no_grad():
        scores = [
            authors.logps(authors.opponent, rows[start : start + TRAIN_PAIRS])
            for start in range(0, len(rows), TRAIN_PAIRS)
        ]
    pairs = [zip(real.tolist(), generated.tolist(), strict=True) for real, generated in scores]
    answer(reference=[list(pair) for each in pairs for pair in each])
    for number in turns:
        part = rows[number * options.batch : (number + 1) * options.batch]
        with timed() as generating:
            tokens = authors.generate(part)
        with timed() as training:
            losses = authors.train(part)
        answer(generate_s=generating["seconds"], train_s=training["seconds"], losses=losses, tokens=tokens)


class Authors:
    """Policy and opponent, both in memory."""

    def __init__(self, options: Any) -> None:
        self._options, folder = options, resolve(MODEL)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self._end, self._pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self._bf16 = options.precision == "bf16"
        frozen = torch.bfloat16 if self._bf16 else torch.float32
        self.policy: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.opponent: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=frozen)
        self.policy.train()  # SmolLM2 has no dropout; checkpointing works in training mode only
        self.policy.gradient_checkpointing_enable({"use_reentrant": False})
        self._optimizer = torch.optim.RMSprop(self.policy.parameters(), lr=options.learning_rate, foreach=True)

    def logps(self, model: Any, pairs: list[dict[str, Any]]) -> Any:
        """Returns log p of the human responses, and of the generated ones."""
        texts = [(row["prompt_ids"], row[name]) for name in ("real_ids", "generated_ids") for row in pairs]
        lengths = torch.tensor([len(prompt) + len(response) for prompt, response in texts])
        longest = int(lengths.max())
        ids = torch.full((len(texts), longest), self._pad)
        scored = torch.zeros(len(texts), longest, dtype=torch.bool)
        for number, (prompt, response) in enumerate(texts):
            end = len(prompt) + len(response)
            ids[number, :end] = torch.tensor(prompt + response)
            scored[number, len(prompt) : end] = True
        seen = torch.arange(longest) < lengths[:, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            logits = model(input_ids=ids, attention_mask=seen.long(), use_cache=False).logits[:, :-1]
        chosen = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (chosen * scored[:, 1:]).sum(-1).chunk(2)

    def train(self, part: list[dict[str, Any]]) -> list[float]:
        return [self._step(part) for _ in range(self._options.epochs)]

    def _step(self, part: list[dict[str, Any]]) -> float:
        total = 0.0
        for start in range(0, len(part), TRAIN_PAIRS):
            pairs = part[start : start + TRAIN_PAIRS]
            with torch.no_grad():
                real_ref, generated_ref = self.logps(self.opponent, pairs)
            real, generated = self.logps(self.policy, pairs)
            margin = BETA * ((real - real_ref) - (generated - generated_ref))
            loss = torch.nn.functional.softplus(-margin).sum() / len(part)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def generate(self, part: list[dict[str, Any]]) -> int:
        tokens = 0
        for start in range(0, len(part), GENERATE_ROWS):
            prompts = [row["prompt_ids"] for row in part[start : start + GENERATE_ROWS]]
            longest = max(map(len, prompts))
            ids = torch.tensor([[self._pad] * (longest - len(prompt)) + prompt for prompt in prompts])
            seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            made = self.opponent.generate(
                input_ids=ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=self._options.max_tokens, eos_token_id=self._end, pad_token_id=self._pad,
            )[:, longest:]  # fmt: skip
            tokens += sum(1 + int((row != self._pad).sum()) if self._pad in row else len(row) for row in made)
        return tokens


if __name__ == "__main__":
    main()
