"""Relatives of SPIN as whole runs on a local Ray; every stage is the real one.

SPPO plays a tiny random model with vLLM: a random preference model says what it is to learn. The others need a model
that answers, so a warm-up teaches the tiny one to. They start two or three engines each, so they play with
transformers, which starts in a second; the answers are the model's own all the same.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import SamplingConfig
from spin_ray.inputs.embedded import resolve
from spin_ray.loop.launch import run_spin
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.runtime.engine import Completion, EngineSpec, VllmEngine
from tests.support.preference_models import save_reward_model

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import a test module
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EMBEDDED = "embedded:tiny-llama"
WARM_UP = {"global_batch_rows": 4, "epochs": 30, "learning_rate": 3e-3}
"""90 steps, after which the tiny model ends nearly all of its answers within 32 tokens."""


class TransformersEngine:
    """Samples of the model folder it is given, by plain transformers."""

    def __init__(self, spec: EngineSpec) -> None:
        self._stop = spec.stop_token_id
        self._model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32)

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int], *, audited: int = 0
    ) -> list[Completion]:
        torch.manual_seed(seeds[0])
        longest = max(map(len, prompt_ids))
        padded = torch.tensor([[self._stop] * (longest - len(ids)) + list(ids) for ids in prompt_ids])
        real = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids])
        written = self._model.generate(
            input_ids=padded, attention_mask=real, do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0,
            max_new_tokens=sampling.max_tokens, eos_token_id=self._stop, pad_token_id=self._stop,
        )  # fmt: skip
        return [self._completion(ids) for ids in written[:, longest:].tolist()]

    def close(self) -> None:
        del self._model

    def _completion(self, ids: list[int]) -> Completion:
        if self._stop in ids:
            return Completion(ids[: ids.index(self._stop) + 1], "stop")
        return Completion(ids, "length")


def config_of(algorithm: str, **sections: Any) -> SpinConfig:
    """One iteration on 12 rows."""
    recipe: dict[str, Any] = {
        "model": {"path": EMBEDDED, "max_length": 160},
        "data": {"train": "embedded:arithmetic-train", "max_rows": 12, "system": ""},
        "algorithm": algorithm,
        "iterations": 1,
        "generation": {
            "shard_rows": 36, "sampling": {"max_tokens": 32}, "resources": {"cpus": 0.5},
            "engine": {"enforce_eager": True, "cpu_kv_cache_gib": 1, "dtype": "float32", "max_num_seqs": 36},
        },
        "train": {
            "global_batch_pairs": 4, "pack_length": 256, "precision": "fp32", "epochs": 1, "learning_rate": 1e-5,
            "resources": {"cpus": 1},
        },
    }  # fmt: skip
    for name, section in sections.items():
        recipe[name] = recipe.get(name, {}) | section
    return SpinConfig.model_validate(recipe)


def run_of(tmp_path: Path, config: SpinConfig, engine: Any = TransformersEngine) -> tuple[RunDir, list[dict[str, Any]]]:
    """Does a run twice (the second time nothing may happen); returns it and its training log."""
    run = run_spin(config, tmp_path / "run", engine).run
    events = len(run.events())
    assert run_spin(config, tmp_path / "run", engine).model == run.storage.path("iter_000/model")
    assert len(run.events()) == events
    log = run.storage.read("iter_000/train_log.jsonl").decode().splitlines()
    return run, [json.loads(line) for line in log]


def rows_of(run: RunDir, path: str) -> list[dict[str, Any]]:
    return [row for table in run.artefact(path).tables() for row in table.to_pylist()]


@pytest.mark.e2e
def test_sppo_judges_samples_and_learns_from_the_best_and_the_worst(tmp_path: Path) -> None:
    """While the policy stands still the log-ratios are 0, and the loss is the mean of ½[(P_w − ½)² + (P_l − ½)²]/β². At
    a learning rate of 1e-12 it does; steps have 4 pairs, the last what is left. The judge reads long responses in part.
    """
    config = config_of(
        "sppo", generation={"samples_per_prompt": 3}, objective={"beta": 0.5}, train={"learning_rate": 1e-12},
        scorer={"path": str(save_reward_model(tmp_path / "judge")), "max_length": 48, "resources": {"cpus": 0.5}},
    )  # fmt: skip
    run, log = run_of(tmp_path, config, VllmEngine)
    assert len(rows_of(run, "iter_000/preferences")) == 36
    [judged] = [it for it in run.events() if (it["event"], it["stage"]) == ("commit", "iter_000/preferences")]
    assert 0 < judged["responses_cut"] <= 36, "prompt and response have more than 48 tokens"
    wins = rows_of(run, "iter_000/wins")
    assert len(wins) == len(rows_of(run, "iter_000/pairs")) >= 8
    assert all(row["real_win"] > row["generated_win"] for row in wins)
    halves = [((row["real_win"] - 0.5) ** 2 + (row["generated_win"] - 0.5) ** 2) / 2 / 0.25 for row in wins]
    sizes = [min(4, len(wins) - 4 * step) for step in range(len(log))]
    losses = [line["loss"] * size for line, size in zip(log, sizes, strict=True)]
    assert log[0]["margin"] == 0.0
    assert sum(losses) == pytest.approx(sum(halves), rel=1e-3)


@pytest.fixture(scope="module")
def taught_itself(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[RunDir, list[dict[str, Any]]]]:
    """Makes a run of self-reinforcement, once; not before the test has a Ray."""
    config = config_of(
        "self_reinforcement", data={"questions": "embedded:arithmetic-heldout"},
        sft=WARM_UP, generation={"samples_per_prompt": 3}, evaluation={},
        self_filter={"min_agreement": 0.3}, train={"global_batch_pairs": 2},
    )  # fmt: skip
    return cache(lambda: run_of(tmp_path_factory.mktemp("self"), config))


def test_self_reinforcement_learns_from_questions_by_what_the_warm_up_changed(
    taught_itself: Callable[[], tuple[RunDir, list[dict[str, Any]]]],
) -> None:
    """12 labelled rows for the warm-up; 12 questions, answered by θ_0 and by the model before it. A pair is one answer
    of each.
    """
    run, log = taught_itself()
    questions = {row["prompt_id"] for row in rows_of(run, "questions")}
    pairs = rows_of(run, "iter_000/pairs")
    answers = {(row["prompt_id"], tuple(row["token_ids"])) for row in rows_of(run, "iter_000/generations")}
    before = {(row["prompt_id"], tuple(row["token_ids"])) for row in rows_of(run, "start/answers")}
    assert len(questions) == 12
    assert len(pairs) >= 2
    assert {(row["prompt_id"], tuple(row["real_ids"])) for row in pairs} <= answers
    assert {(row["prompt_id"], tuple(row["generated_ids"])) for row in pairs} <= before
    assert {row["opponent"] for row in rows_of(run, "start/answers")} == {"start"}
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_seft_trains_a_reviser_and_fine_tunes_on_what_it_revised(
    tmp_path: Path, taught_itself: Callable[[], tuple[RunDir, list[dict[str, Any]]]]
) -> None:
    """What the reviser kept or revised is learnt from, what it did not label or finish is counted.

    Only answers that end are revised. The warm-up is the other run's.
    """
    config = config_of(
        "seft", data={"questions": "embedded:arithmetic-heldout"},
        sft=WARM_UP, reviser=WARM_UP | {"epochs": 60}, train={"global_batch_pairs": 1},
    )  # fmt: skip
    warmed = taught_itself()[0]
    for name in ("prompts", "questions", "sft"):
        shutil.copytree(warmed.storage.path(name), tmp_path / "run" / name)
    told = warmed.description() | {"config": config.model_dump(mode="json")}
    (tmp_path / "run" / "run.json").write_text(json.dumps(told))
    run, log = run_of(tmp_path, config)
    tokenizer = AutoTokenizer.from_pretrained(resolve(EMBEDDED))
    assert run.artefact("reviser/model").verify().files
    assert len(rows_of(run, "reviser/rows")) == 12
    learnt, counts = rows_of(run, "iter_000/pairs"), run.pairs(0).manifest().counts
    dropped = sum(counts.get(f"dropped_{reason}", 0) for reason in ("no_label", "revision_cut", "too_long"))
    assert len(learnt) + dropped == len(rows_of(run, "iter_000/revisions"))
    assert learnt, counts
    texts = [tokenizer.decode(row["real_ids"], skip_special_tokens=True) for row in learnt]
    assert not any(label in text for text in texts for label in ("[keep]", "[minor]", "[major]"))
    assert "margin" not in log[0] and log[0]["loss"] > 0
