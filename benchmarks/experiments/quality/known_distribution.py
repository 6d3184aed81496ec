"""SPIN on a known distribution: exact divergences after every iteration.

    python benchmarks/experiments/quality/known_distribution.py [--seeds 0 1 2] [--iterations 6]

A random Markov chain gives p_data of the 1,296 sequences of 4 symbols out of 6, so KL(p_data‖p_θ) and JSD are sums, not
estimates. A small Llama is fine-tuned until held-out sequences get no likelier (θ_0); continued SFT and SPIN start
there. They are compared with iterations that are solved exactly, p_{t+1} ∝ p_t (p_data/p_t)^{1/β} (Theorem 5.4).
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from spin_ray.learner.losses import MARGIN_FUNCTIONS, margins, sft_loss, spin_loss

SYMBOLS, LENGTH, START = 6, 4, 6
OUTCOMES = torch.tensor(list(product(range(SYMBOLS), repeat=LENGTH)))
"""[1296, 4]"""
ROWS, HELDOUT_ROWS, BATCH = 2000, 2000, 100
RESULTS = Path(__file__).resolve().parents[2] / "results" / "known_distribution.json"


@dataclass(frozen=True)
class Arm:
    name: str
    loss: str | None
    """None: continued SFT."""
    beta: float = 1.0
    learning_rate: float = 1e-3
    sft_weight: float = 0.0


ARMS = [
    Arm("continued SFT", None),
    Arm("continued SFT, a tenth of the rate", None, learning_rate=1e-4),
    *(Arm(f"SPIN β {beta:g}", "logistic", beta) for beta in (0.1, 0.4, 1.0, 5.0)),
    *(Arm(f"SPIN β {beta:g}, a tenth of the rate", "logistic", beta, 1e-4) for beta in (0.1, 1.0)),
    Arm("SPIN β 1, weight 1 on −log p(y)", "logistic", 1.0, sft_weight=1.0),
]


def markov_chain(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first = (1.5 * torch.randn(SYMBOLS, generator=generator)).log_softmax(-1)
    following = (1.5 * torch.randn(SYMBOLS, SYMBOLS, generator=generator)).log_softmax(-1)
    steps = [following[OUTCOMES[:, i], OUTCOMES[:, i + 1]] for i in range(LENGTH - 1)]
    return (first[OUTCOMES[:, 0]] + torch.stack(steps).sum(0)).double().log_softmax(0)


def small_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SYMBOLS + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=8, attention_dropout=0.0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def logps(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Returns log p of sequences [rows, 4]; the start symbol is never drawn."""
    inputs = torch.cat([torch.full((len(rows), 1), START), rows[:, :-1]], dim=1)
    logits = model(input_ids=inputs).logits[..., :SYMBOLS].log_softmax(-1)
    return logits.gather(-1, rows[..., None]).squeeze(-1).sum(-1)


@torch.no_grad()
def table(model: LlamaForCausalLM) -> Tensor:
    """Returns log p of every outcome, normalised, as fp32 sums to 1 within 1e-6 only."""
    return logps(model, OUTCOMES).double().log_softmax(0)


def kl(p: Tensor, q: Tensor) -> float:
    return max((p.exp() * (p - q)).sum().item(), 0.0)  # rounding can leave −1e-17


def jsd(p: Tensor, q: Tensor) -> float:
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl(p, middle) + kl(q, middle)) / 2


def draw(log_p: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return OUTCOMES[torch.multinomial(log_p.exp(), count, replacement=True, generator=generator)]


def epoch(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    loss: Callable[[Tensor], Tensor],
) -> None:
    """Trains one pass over the rows; ``loss`` gets row numbers and returns a mean."""
    for chosen in torch.randperm(ROWS, generator=generator).split(BATCH):
        optimizer.zero_grad()
        loss(chosen).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def warm_up(real: Tensor, heldout: Tensor, seed: int) -> LlamaForCausalLM:
    """Returns θ_0: SFT until held-out rows get no likelier for three epochs, with the best epoch's weights."""
    model, generator = small_llama(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    best, state, since = -math.inf, model.state_dict(), 0
    while since < 3:
        epoch(model, optimizer, generator, lambda rows: sft_loss(logps(model, real[rows])) / len(rows))
        with torch.no_grad():
            value = logps(model, heldout).mean().item()
        since += 1
        if value > best:
            best, since = value, 0
            state = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def iterate(model: LlamaForCausalLM, arm: Arm, real: Tensor, generator: torch.Generator) -> None:
    """Trains one iteration: a fresh y′ for every row, then one epoch with a fresh optimizer."""
    opponent = table(model)
    generated = draw(opponent, ROWS, generator)
    with torch.no_grad():
        reference_real, reference_generated = logps(model, real), logps(model, generated)

    def loss(rows: Tensor) -> Tensor:
        real_logp = logps(model, real[rows])
        if arm.loss is None:
            return sft_loss(real_logp) / len(rows)
        margin = margins(
            real_logp, logps(model, generated[rows]), reference_real[rows], reference_generated[rows], arm.beta
        )
        return (spin_loss(margin, MARGIN_FUNCTIONS[arm.loss]) + arm.sft_weight * sft_loss(real_logp) / LENGTH) / len(
            rows
        )

    epoch(model, torch.optim.AdamW(model.parameters(), arm.learning_rate, weight_decay=0.0), generator, loss)


def run(seed: int, iterations: int) -> dict[str, Any]:
    """Returns KL and JSD of every arm's iterates from θ_0 on, and KL of exact iterations."""
    data = markov_chain(seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    real, heldout = draw(data, ROWS, generator), draw(data, HELDOUT_ROWS, generator)
    start = warm_up(real, heldout, seed).state_dict()
    found: dict[str, Any] = {}
    for arm in ARMS:
        model = small_llama(seed)
        model.load_state_dict(start)
        arm_generator = torch.Generator().manual_seed(seed + 2000)
        tables = [table(model)]
        for _ in range(iterations):
            iterate(model, arm, real, arm_generator)
            tables.append(table(model))
        found[arm.name] = {"kl": [kl(data, each) for each in tables], "jsd": [jsd(data, each) for each in tables]}
        if arm.loss is not None:
            exact = [tables[0]]
            for _ in range(iterations):
                exact.append((exact[-1] + (data - exact[-1]) / arm.beta).log_softmax(-1))
            found[arm.name]["exact_kl"] = [kl(data, each) for each in exact]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = {seed: run(seed, options.iterations) for seed in options.seeds}
    options.out.parent.mkdir(exist_ok=True)
    script, seeds = "benchmarks/experiments/quality/known_distribution.py", " ".join(map(str, options.seeds))
    command = f"python {script} --iterations {options.iterations} --seeds {seeds}"
    options.out.write_text(json.dumps({"command": command, "seeds": runs}, indent=1) + "\n")
    print(f"KL(p_data‖p_θ) in millinats, mean of {len(runs)} seeds; in brackets exact iterations (Theorem 5.4)")
    for arm in ARMS:
        measured = zip(*(found[arm.name]["kl"] for found in runs.values()), strict=True)
        print(f"{arm.name:40}", *(f"{1000 * statistics.mean(values):8.1f}" for values in measured))
        if arm.loss is not None:
            exact = zip(*(found[arm.name]["exact_kl"] for found in runs.values()), strict=True)
            print(f"{'':40}", *(f"({1000 * statistics.mean(values):.1f})".rjust(8) for values in exact))


if __name__ == "__main__":
    main()
