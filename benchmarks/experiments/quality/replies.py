"""Setting and arms of the experiment on replies: small talk between people, without right answers.

An arm is sampled at each of ``TEMPERATURES``, as a lower temperature is the cheapest competitor.
"""

import copy
from dataclasses import replace
from typing import Any

from arms import CPU, SFT, WARM_UP, Arm, Recipe, Setting
from arms import SETTINGS as OF_ANSWERS

TEMPERATURES = (0.7, 0.85, 1.0)
PROMPTS, BATCH, RATE = 640, 16, 1e-5
"""Prompts of an iteration, rows or pairs of a step (40 steps), and self-play's learning rate.

10 steps at 2e-6 moved the margin by 0.04 ± 0.03 nats."""


def _spin(
    name: str, why: str, *, algorithm: str = "spin", samples: int = 1, iterations: int = 2, **objective: Any
) -> Arm:
    rows = "prompts_per_iteration" if algorithm == "spin" else "max_rows"  # T-SPIN plays the same prompts again
    changes: Recipe = {
        "algorithm": algorithm, "iterations": iterations,
        "objective": {"beta": 1.0, "window": 1, "sft_weight": 0.3, "keep_identical": True} | objective,
        "data": {rows: PROMPTS},
        "generation": {"samples_per_prompt": samples},
        "train": {"learning_rate": RATE, "global_batch_pairs": BATCH * samples},
    }  # fmt: skip
    return Arm(name=name, why=why, changes=changes, is_spin=True, seeds=3)


def _sft(name: str, why: str, **changes: Any) -> Arm:
    return Arm(name=name, why=why, changes={"algorithm": SFT} | changes)


ARMS = (
    replace(
        _sft(
            WARM_UP, "θ_0: SFT, an epoch an iterate, to the plateau of held-out log p(y)",
            data={"prompts_per_iteration": None}, train={"global_batch_pairs": BATCH},
        ),
        from_base=True,
    ),
    replace(
        _sft(
            SFT, "the baseline, at each temperature", iterations=6, data={"prompts_per_iteration": PROMPTS},
            train={"learning_rate": 2e-5, "global_batch_pairs": BATCH},
        ),
        seeds=3,
    ),
    _spin("spin_anchored", "the demonstration's objective: β 1, an anchor on log p(y)"),
    _spin("spin", "the paper's objective: β 0.1, y′ of two iterations, no anchor", beta=0.1, window=2, sft_weight=0.0),
    _spin("space", "SPACE: absolute rewards", loss="space", sft_weight=0.0),
    _spin("spin_4_samples", "four y′ for each y", samples=4),
    _spin("alpha_spin", "α-SPIN: geometric reference", reference_alpha=0.9),
    _spin("fictitious_play", "every iterate so far is an opponent", window="all", iterations=3),
    _spin("tspin", "T-SPIN: y′ of θ_t against that of θ_0, no reference", algorithm="tspin", sft_weight=0.0),
    replace(
        _sft(
            "sdft", "self-distillation: the teacher is θ_t with y in its prompt", algorithm="sdft", iterations=2,
            data={"prompts_per_iteration": PROMPTS}, train={"learning_rate": RATE, "global_batch_pairs": BATCH},
        ),
        is_spin=True, seeds=3,
    ),
)  # fmt: skip


def _settings() -> dict[str, Setting]:
    recipe = copy.deepcopy(CPU)
    recipe["model"] = {"path": "embedded:smollm2-135m-instruct", "max_length": 192}
    recipe["data"] = {"system": ""}
    recipe["generation"] |= {"sampling": {"max_tokens": 48}, "shard_rows": 264}
    recipe["train"] |= {"pack_length": 1024, "precision": "auto"}
    whole = Setting(
        name="replies", train="embedded:replies-train", test="embedded:replies-heldout", recipe=recipe,
        warm_up_rates=(1e-4, 1e-4, 5e-5, 5e-5, 2e-5), dev_rows=600, own_arms=ARMS, extractor="none", cooler=(),
        temperatures=TEMPERATURES,
    )  # fmt: skip
    first = replace(
        whole, name="replies_first_pass", train_rows=960, dev_rows=160, test_rows=320, most_iterations=4,
        warm_up_rates=(1e-4, 5e-5),
    )  # fmt: skip
    return {setting.name: setting for setting in (whole, first)}


FIRST_PASS_OF = {"replies": "replies_first_pass"}
"""Setting whose results are shown while the whole one has none."""
SETTINGS = OF_ANSWERS | _settings()
