"""``train.gradient_checkpointing: auto`` as the workers decide it, for their own cards."""

import json

import pytest
import torch

from spin_ray.loop.stages.training.recomputation import decide, recomputes
from tests.support.planning_cases import RMSPROP, ZEPHYR

MISTRAL = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
GB = 1e9


@pytest.mark.parametrize(
    ("changes", "room", "workers", "on"),
    [
        ({}, 80 * GB, 8, False),
        ({}, 80 * GB, 4, False),
        ({}, 80 * GB, 2, True),  # an elastic group that shrank: 12 bytes a parameter over two are 43 GB
        ({}, 40 * GB, 8, True),
        ({"num_local_experts": 8}, 80 * GB, 8, True),
    ],
)
def test_activations_are_computed_again_where_they_might_not_fit(tmp_path, changes, room, workers, on):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL | changes))
    assert decide(ZEPHYR, RMSPROP, tmp_path, room, workers) is on


def test_cpus_compute_no_activations_again(tmp_path):
    assert recomputes(ZEPHYR, RMSPROP, tmp_path, torch.device("cpu")) is False
