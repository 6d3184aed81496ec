"""Four gloo processes on every kind of mesh against one: the same losses, norms, scores, weights and exports."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.step import score_rows
from tests.support.learner_cases import one_rank, one_step, table_of
from tests.support.mesh_cases import (
    CASES,
    MESHES,
    RANKS,
    RESUMED,
    ROWS,
    STEPS,
    file_of,
    make_backend,
    run_four,
    shape_on,
    train,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
Case = tuple[str, str, str]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks left behind."""
    directory = tmp_path_factory.mktemp("ranks")
    run_four(directory)
    return directory


@pytest.fixture(scope="module", autouse=True)
def alone(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("alone")):
        yield


def told(directory: Path, *case: str) -> list[Any]:
    return [json.loads(Path(f"{file_of(directory, *case)} {rank}.json").read_text()) for rank in range(RANKS)]


def weights(backend: Fsdp2Backend) -> dict[str, torch.Tensor]:
    return {name: shard.full_tensor() for name, shard in backend._shards.items()}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_four_ranks_train_as_one_does_and_export_the_same_bits(directory: Path, tmp_path: Path, case: Case) -> None:
    """Three packs are distributed unequally, so that a mean per rank, or one per tensor rank, would differ.

    The export is compared with that of one rank which loaded the checkpoint of the four.
    """
    model, _, more = case
    backend = make_backend(directory, model, None, more)
    rows, real, generated = score_rows(backend, [one_step(ROWS)], table_of(ROWS), shape_on(None))
    expected = train(backend, None, STEPS)
    found = told(directory, *case)
    for rank in found:
        assert rank["history"] == [pytest.approx(step, rel=5e-5, abs=1e-6) for step in expected]
        assert rank["history"] == found[0]["history"]
    scored = [row for rank in found if rank["writes"] for row in zip(*rank["scored"], strict=True)]
    assert len(scored) == len(ROWS)
    for one, other in zip(sorted(scored), sorted(zip(rows, real, generated, strict=True)), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-4)

    exported = load_file(Path(f"{file_of(directory, *case)} export") / "model.safetensors")
    resumed = make_backend(directory, model, None, more)
    resumed.load(Path(f"{file_of(directory, *case)} checkpoint"))
    assert resumed.steps_done == STEPS
    resumed.export_hf(tmp_path)
    mine = load_file(tmp_path / "model.safetensors")
    assert mine.keys() == exported.keys() and all(torch.equal(mine[name], exported[name]) for name in mine)
    for name, weight in weights(backend).items():
        torch.testing.assert_close(weights(resumed)[name], weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", [case for case in CASES if "tensor" in case[1]], ids=" ".join)
def test_a_tensor_group_has_one_set_of_packs_and_equal_weights_where_they_are_whole(
    directory: Path, case: Case
) -> None:
    found = told(directory, *case)
    for one, other in ((0, 1), (2, 3)):
        assert (found[one]["writes"], found[other]["writes"]) == (True, False)
        for what in ("scored", "plain"):
            assert found[one][what] == found[other][what]
    assert found[0]["scored"][0] != found[2]["scored"][0]


@pytest.mark.parametrize(("before", "after", "more"), RESUMED)
def test_a_checkpoint_loads_under_another_mesh(directory: Path, before: str, after: str, more: str) -> None:
    """The step after it, and not only the weights: the optimizer's state travels, too."""
    backend = make_backend(directory, "llama", None, more)
    train(backend, None, STEPS)
    (expected,) = train(backend, None, 1)
    for (step,) in told(directory, before, after, more):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_plan_that_does_not_give_the_models_own_numbers_is_refused_on_every_rank(directory: Path) -> None:
    """Queries of half the heads, keys of all: one product no longer fits."""
    for rank in range(RANKS):
        message = (directory / f"refused {rank}").read_text()
        assert message.startswith("train.mesh.tensor: LlamaForCausalLM ")
        assert message.endswith("; use train.mesh: {shard: 4}")


def test_the_meshes_are_the_ones_that_are_named() -> None:
    assert [mesh.ranks for mesh in MESHES.values()] == [RANKS] * len(MESHES)
    assert [mesh.data_ranks for mesh in MESHES.values()] == [4, 4, 2, 2]
