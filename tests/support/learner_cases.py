"""Small models and pair tables for tests of the learner."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from spin_ray.learner.backends.base import TrainBackend
from spin_ray.learner.batch import PackedBatch
from spin_ray.learner.losses import margins, pair_logps, spin_loss
from spin_ray.learner.packing import PairLengths, Step, build_pack, plan_epoch
from spin_ray.run_dir.schemas import TOKEN_IDS

VOCAB = 61
PACK_LENGTH = 48
Row = tuple[list[int], list[int], list[int]]


@contextmanager
def one_rank(folder: Path, backend: str = "gloo") -> Iterator[None]:
    """Opens a process group of this process alone; ``folder`` is for its store."""
    torch.set_num_threads(1)
    dist.init_process_group(backend, store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def table_of(rows: list[Row]) -> pa.Table:
    """Returns (prompt, human, generated) token ids as columns."""
    names = ("prompt_ids", "real_ids", "generated_ids")
    return pa.table({name: pa.array([row[i] for row in rows], TOKEN_IDS) for i, name in enumerate(names)})


def random_rows(seed: int, trees: int, *, samples: int = 2, longest: int = 8) -> list[Row]:
    """Returns ``trees`` prompts, each with one human response and 1 to ``samples`` generated ones."""
    rng = np.random.default_rng(seed)

    def tokens() -> list[int]:
        return rng.integers(1, VOCAB, rng.integers(1, longest + 1)).tolist()

    rows = []
    for _ in range(trees):
        prompt, real = tokens(), tokens()
        rows += [(prompt, real, tokens()) for _ in range(rng.integers(1, samples + 1))]
    return rows


def lengths_of(rows: list[Row]) -> PairLengths:
    keys: dict[Any, int] = {}
    return PairLengths(
        prompt=np.array([len(prompt) for prompt, _, _ in rows]),
        real=np.array([len(real) for _, real, _ in rows]),
        generated=np.array([len(generated) for _, _, generated in rows]),
        tree_key=np.array([keys.setdefault((*prompt, -1, *real), len(keys)) for prompt, real, _ in rows]),
    )


def one_step(rows: list[Row], *, pack_length: int = PACK_LENGTH) -> Step:
    (step,) = plan_epoch(lengths_of(rows), pack_length=pack_length, global_batch_pairs=len(rows), seed=0, epoch=0)
    return step


def batches_of(rows: list[Row], *, pack_length: int = PACK_LENGTH) -> list[PackedBatch]:
    packs, table = one_step(rows, pack_length=pack_length).packs, table_of(rows)
    return [build_pack(pack, table, pack_length=pack_length, pad_id=0) for pack in packs]


def tiny_llama(*, tied: bool = True, seed: int = 0, layers: int = 2, hidden: int = 32) -> LlamaForCausalLM:
    """Returns a random Llama whose log-probabilities depend strongly on every token (weights 10 times the usual)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2, attention_dropout=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_model(directory: Path, model: Any) -> Path:
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def logp_alone(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """Returns log p(response | prompt) by transformers alone: one unpadded sequence, without mask and positions."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    logps = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
    return logps[torch.arange(len(response)), torch.tensor(response)].sum()


def train(backend: TrainBackend, rows: list[Row], steps: int) -> list[list[float]]:
    """Trains on all rows against a reference of 0; returns [loss over all ranks, gradient norm] of each step."""
    step, table, history = one_step(rows), table_of(rows), []
    packs = step.for_rank(dist.get_rank(), dist.get_world_size())
    for _ in range(steps):
        total = torch.zeros(())
        for i, pack in enumerate(packs):
            batch = build_pack(pack, table, pack_length=PACK_LENGTH, pad_id=0).to(backend.device)
            real, generated = pair_logps(backend.logps(batch), batch)
            zero = torch.zeros_like(real)
            loss = spin_loss(margins(real, generated, zero, zero, 0.5)) / step.num_pairs
            backend.backward(loss, last_microbatch=i == len(packs) - 1)
            total += loss.detach().cpu()
        dist.all_reduce(total)
        history.append([total.item(), backend.step().grad_norm])
    return history
