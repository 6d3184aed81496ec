"""``train.gradient_checkpointing: auto`` as the workers decide it, for their own cards."""

import json
from dataclasses import replace

import pytest
import torch

from spin_ray.config.sections import Mesh
from spin_ray.loop.stages.training.recomputation import decide, recomputes
from spin_ray.planning.groups import Ranks
from spin_ray.planning.hardware import GB
from spin_ray.planning.learner_cost import FILLED, training_cost
from spin_ray.planning.mesh import memory_of
from spin_ray.planning.model_shape import MISTRAL_7B
from tests.support.planning_cases import A100, FULL_PACKS, MISTRAL, RMSPROP, ZEPHYR


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
    assert decide(ZEPHYR, RMSPROP, tmp_path, room, Mesh(shard=workers)) is on


@pytest.mark.parametrize(
    "mesh",
    [Mesh(replicate=8), Mesh(replicate=4, tensor=2), Mesh(tensor=8), Mesh(replicate=2, shard=4)],
    ids=str,
)
def test_the_plan_the_choice_of_a_mesh_and_the_workers_count_the_same_bytes(tmp_path, mesh):
    """A shard of one rank needs the fp32 buffers, too: torch's ``foreach_reduce`` allocates them for any group."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    plain = ZEPHYR.with_train(workers=8, gradient_checkpointing=False)
    device, ranks = replace(A100, memory=1000 * GB), Ranks(mesh=mesh, per_node=8)
    planned = training_cost(plain, MISTRAL_7B, device, FULL_PACKS, 1, RMSPROP, ranks)
    assert planned.needed == memory_of(plain, MISTRAL_7B, mesh, device.memory)
    mine = MISTRAL_7B.split(mesh.tensor)
    gathered = mine.root + (2 if mesh.shard > 1 else mine.layers) * mine.layer
    assert planned.memory["gathered weights"] == 2 * gathered + 8 * max(mine.root, mine.layer)
    for spare, on in ((1, False), (-1, True)):
        assert decide(ZEPHYR, RMSPROP, tmp_path, planned.needed / FILLED + spare, mesh) is on


def test_cpus_compute_no_activations_again(tmp_path):
    assert recomputes(ZEPHYR, RMSPROP, tmp_path, torch.device("cpu")) is False
