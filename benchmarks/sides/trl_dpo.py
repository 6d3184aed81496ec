"""Side of training benchmarks: TRL's DPOTrainer at its best settings for CPUs. A turn is one optimizer step.

Runs in its own environment (requirements/peers.txt), so it imports nothing of this project. The DPO loss with the
opponent as reference is the logistic SPIN loss.
"""

import argparse
import json
import os
import sys
import time

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class TokenisedDPOTrainer(DPOTrainer):
    """A DPOTrainer over rows of token ids, in their order."""

    def _prepare_dataset(self, dataset, *_args, **_kwargs):
        return dataset

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(dataset if dataset is not None else self.train_dataset)


class Turns(TrainerCallback):
    """A callback that starts a step when it is told to, and answers with its seconds."""

    def __init__(self, reply: int) -> None:
        self.pipe = os.fdopen(reply, "w", buffering=1)

    def answer(self, **values) -> None:
        self.pipe.write(json.dumps(values) + "\n")

    def on_step_begin(self, args, state, control, **_kwargs):
        if not sys.stdin.readline():
            raise SystemExit
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_kwargs):
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args, state, control, logs=None, **_kwargs):
        if logs and "loss" in logs:
            self.answer(seconds=self.seconds, loss=float(logs["loss"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", required=True, help="JSON file")
    parser.add_argument("--batch", type=int, required=True, help="pairs of a step")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--model", required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["bf16", "fp32"], required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--reply", type=int, required=True)
    options = parser.parse_args()
    if options.batch % options.micro_batch:
        parser.error(f"--batch {options.batch}: is no multiple of --micro-batch {options.micro_batch}")
    torch.set_num_threads(options.threads)
    with open(options.pairs) as file:
        rows = json.load(file)
    order = [
        number
        for start in range(0, len(rows), options.batch)
        for number in sorted(
            range(start, min(start + options.batch, len(rows))),
            key=lambda number: sum(map(len, rows[number].values())),
        )
    ]
    dataset = datasets.Dataset.from_list(
        [
            {"prompt_ids": row["prompt_ids"], "chosen_ids": row["real_ids"], "rejected_ids": row["generated_ids"]}
            for row in (rows[number] for number in order)
        ]
    )
    turns = Turns(options.reply)
    trainer = TokenisedDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="sdpa"),
        args=DPOConfig(
            output_dir=options.output, use_cpu=True, bf16=options.precision == "bf16", beta=0.1,
            gradient_checkpointing=False, precompute_ref_log_probs=True, num_train_epochs=1, max_length=None,
            per_device_train_batch_size=options.micro_batch,
            gradient_accumulation_steps=options.batch // options.micro_batch,
            optim="rmsprop", weight_decay=0.0, max_grad_norm=1.0, learning_rate=options.learning_rate,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False,
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[turns],
    )  # fmt: skip
    scores = [[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in trainer.train_dataset]
    by_row = sorted(range(len(order)), key=lambda place: order[place])
    turns.answer(reference=[scores[place] for place in by_row])
    trainer.train()


if __name__ == "__main__":
    main()
