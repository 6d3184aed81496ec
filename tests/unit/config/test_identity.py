"""What makes two runs the same run: every setting but those that say where they are declared that they may change."""

from typing import Any

import pytest

from spin_ray.config.recipe import SpinConfig, digest, flatten
from tests.support.fakes import config_of

MAY_CHANGE = (
    "iterations", "probe", "stop_when", "tracking.", "cluster.", "storage.", "health.", "serving.",
    "objective.beta", "train.learning_rate", "train.epochs", "train.schedule_epochs", "train.max_failures",
    "train.checkpoint_every_steps",
    "train.sharding", "train.reduce_every_pack", "train.offload", "train.start_timeout_s", "train.stall_timeout_s",
    "train.compile", "train.deterministic", "train.optimizer.betas", "train.optimizer.eps",
    "sft.optimizer.betas", "sft.optimizer.eps", "reviser.optimizer.betas", "reviser.optimizer.eps",
    "train.mesh", "train.min_workers", "train.resize_interval_s", "train.resources.custom", "train.resources.labels",
    "generation.replicas", "generation.min_replicas", "generation.max_failures", "generation.start_timeout_s",
    "generation.shard_timeout_s", "generation.resources.custom", "generation.resources.labels",
    "generation.engine.gpu_memory_utilization", "generation.engine.cpu_kv_cache_gib",
    "generation.engine.pipeline_parallel_size",  # follows from the GPUs of an engine and tensor_parallel_size
)  # fmt: skip
"""Beginnings of the names of settings that two calls of one run may give different values."""

EVERYWHERE = {"cpus": 2, "custom": {"fast": 1}, "labels": {"pool": "any"}}
EVERY_SECTION: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"train": "d.jsonl", "heldout": "h.jsonl"},
    "sft": {},
    "generation": {"samples_per_prompt": 2, "resources": EVERYWHERE, "engine": {"extra": {"kv_cache_dtype": "auto"}}},
    "train": {"lora": {}, "resources": EVERYWHERE},
    "probe": {},
    "stop_when": {},
    "tracking": {"mlflow": {}, "wandb": {}},
    "serving": {"engine": {}, "resources": EVERYWHERE},
}
OF_ALGORITHMS: dict[str, dict[str, Any]] = {
    "sppo": {"scorer": {"path": "judge", "resources": EVERYWHERE}},
    "self_reinforcement": {"self_filter": {}, "data": {"train": "d", "heldout": "h", "questions": "q"}},
    "seft": {"reviser": {}},
}


@pytest.mark.parametrize("algorithm", OF_ALGORITHMS)
def test_exactly_these_settings_may_change_between_two_calls_of_a_run(algorithm):
    config = SpinConfig.model_validate(EVERY_SECTION | {"algorithm": algorithm} | OF_ALGORITHMS[algorithm])
    every = flatten(config.model_dump(mode="json"))
    assert config.identity() == {key: value for key, value in every.items() if not key.startswith(MAY_CHANGE)}


@pytest.mark.parametrize(
    "sections",
    [
        {"cluster": {"address": "auto", "local_cpus": 4, "wait_for_nodes_s": 60}},
        {"storage": {"lease_timeout_s": 10, "keep_checkpoints": True}},
        {"generation": {"replicas": 8, "start_timeout_s": 5, "shard_timeout_s": 5}},
        {"generation": {"resources": {"custom": {"fast": 1}}}},
        {"generation": {"engine": {"gpu_memory_utilization": 0.5, "cpu_kv_cache_gib": 8}}},
        {"train": {"max_failures": 9, "checkpoint_every_steps": 1, "start_timeout_s": 5}},
        {"train": {"resources": {"custom": {"fast": 1}}}},
        {"iterations": 9},
        {"iterations": 5, "objective": {"beta": [1.0, 1.0, 1.0, 1.0, 2.0]}},
    ],
)
def test_identity_ignores_where_and_how_fast_it_runs_and_what_may_grow(sections):
    assert config_of(**sections).identity() == config_of().identity()


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"seed": 1}, {"seed"}),
        (
            {"model": {"path": "m", "chat_template_kwargs": {"think": True}}},
            {"model.chat_template_kwargs", "model.chat_template_kwargs.think"},
        ),
        ({"data": {"train": "other.jsonl"}}, {"data.train"}),
        ({"data": {"train": "d.jsonl", "form": "alpaca"}}, {"data.form"}),
        (
            {"data": {"train": "d.jsonl", "heldout": "h"}, "evaluation": {"samples": 4, "grade": "exact"}},
            {"data.heldout", "evaluation.samples", "evaluation.grade"},
        ),
        ({"data": {"train": "d.jsonl", "columns": {"prompt": "q"}}}, {"data.columns", "data.columns.prompt"}),
        ({"generation": {"sampling": {"top_p": 0.9}}}, {"generation.sampling.top_p"}),
        ({"generation": {"shard_rows": 8}}, {"generation.shard_rows"}),
        ({"generation": {"engine": {"dtype": "float32"}}}, {"generation.engine.dtype"}),
        ({"objective": {"loss": "hinge"}}, {"objective.loss"}),
        ({"objective": {"window": "all"}}, {"objective.window"}),
        ({"objective": {"reference_alpha": 0.5}}, {"objective.reference_alpha"}),
        ({"objective": {"length_normalised": True}}, {"objective.length_normalised"}),
        ({"algorithm": "dpo"}, {"algorithm"}),
        ({"train": {"optimizer": {"name": "adamw"}}}, {"train.optimizer.name"}),
        ({"train": {"workers": 2}}, {"train.workers"}),
    ],
)
def test_identity_holds_what_decides_the_result(sections, keys):
    one, other = config_of().identity(), config_of(**sections).identity()
    assert {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} == keys


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1, "b": [1, 2]}) != digest({"a": 1, "b": [2, 1]})


def test_flatten_keeps_empty_sections():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}}) == {"a.b.c": 1, "a.d": {}}
