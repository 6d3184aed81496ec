"""Side of the iteration benchmark: SPIN as its authors ran it, from the published description. A turn is one iteration.

Responses come from transformers' ``generate``, in batches padded on the left. A training step pads every response with
its own copy of the prompt, takes the logits of all positions, asks a second, frozen model for the reference each time,
and recomputes activations (gradient checkpointing). Written for this comparison; the loss is the logistic one.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import MODEL, THREADS, replies, side_options, timed

from spin_ray.inputs.embedded import resolve

GENERATE_ROWS, TRAIN_PAIRS = 16, 8
"""Rows of a batch that generates, pairs of a batch that trains."""
BETA = 0.1


def main() -> None:
    parser = side_options(__doc__)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(THREADS)
    folder = resolve(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    frozen = torch.bfloat16 if options.precision == "bf16" else torch.float32
    opponent = AutoModelForCausalLM.from_pretrained(folder, dtype=frozen)
    policy.train()  # SmolLM2 has no dropout; checkpointing works in training mode only
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=options.learning_rate, foreach=True)
    rows = json.loads(options.pairs.read_text())
    pad = tokenizer.pad_token_id

    def computing():
        return torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16")

    def logps(model, pairs):
        """log p of every real response, then of every generated one."""
        texts = [(row["prompt_ids"], row[name]) for name in ("real_ids", "generated_ids") for row in pairs]
        longest = max(len(prompt) + len(response) for prompt, response in texts)
        ids = torch.full((len(texts), longest), pad)
        scored = torch.zeros(len(texts), longest, dtype=torch.bool)
        for number, (prompt, response) in enumerate(texts):
            end = len(prompt) + len(response)
            ids[number, :end] = torch.tensor(prompt + response)
            scored[number, len(prompt) : end] = True
        seen = (
            torch.arange(longest) < torch.tensor([len(prompt) + len(response) for prompt, response in texts])[:, None]
        )
        with computing():
            logits = model(input_ids=ids, attention_mask=seen.long(), use_cache=False).logits[:, :-1]
        chosen = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (chosen * scored[:, 1:]).sum(-1).chunk(2)

    def train(part) -> list[float]:
        losses = []
        for _ in range(options.epochs):
            total = 0.0
            for start in range(0, len(part), TRAIN_PAIRS):
                pairs = part[start : start + TRAIN_PAIRS]
                with torch.no_grad():
                    real_ref, generated_ref = logps(opponent, pairs)
                real, generated = logps(policy, pairs)
                margin = BETA * ((real - real_ref) - (generated - generated_ref))
                loss = torch.nn.functional.softplus(-margin).sum() / len(part)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
        return losses

    def generate(part) -> int:
        tokens = 0
        for start in range(0, len(part), GENERATE_ROWS):
            prompts = [row["prompt_ids"] for row in part[start : start + GENERATE_ROWS]]
            longest = max(map(len, prompts))
            ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
            seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            made = opponent.generate(
                input_ids=ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=options.max_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad,
            )[:, longest:]  # fmt: skip
            tokens += sum(1 + int((row != pad).sum()) if pad in row else len(row) for row in made)
        return tokens

    answer, turns = replies(options.reply)
    with torch.no_grad():
        scores = [logps(opponent, rows[start : start + TRAIN_PAIRS]) for start in range(0, len(rows), TRAIN_PAIRS)]
    answer(
        reference=[
            list(pair) for real, generated in scores for pair in zip(real.tolist(), generated.tolist(), strict=True)
        ]
    )
    for number in turns:
        part = rows[number * options.batch : (number + 1) * options.batch]
        with timed() as generating:
            tokens = generate(part)
        with timed() as training:
            losses = train(part)
        answer(generate_s=generating["seconds"], train_s=training["seconds"], losses=losses, tokens=tokens)


if __name__ == "__main__":
    main()
