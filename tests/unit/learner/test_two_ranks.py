"""Two gloo processes against one: the same losses, norms and weights, though their packs are unequal."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spin_ray.config.sections import OptimizerConfig
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.loading import empty_model
from spin_ray.learner.packing import build_pack
from spin_ray.learner.step import Objective, PackShape, ReferenceScores, train_step
from tests.support.learner_cases import (
    PACK_LENGTH,
    one_rank,
    one_step,
    random_rows,
    save_model,
    table_of,
    tiny_llama,
    train,
)
from tests.support.model_kinds import KINDS
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROWS = random_rows(0, trees=8)
CASES = ("packed full", "padded full", "packed shard_grad_op", "packed full every-pack", "packed full offload")
"""Layout, sharding, and when gradients are reduced or where shares are kept."""
FUSED = {"experts": "Qwen3-MoE", "w1": "Mixtral", "buffers": "DeepSeek-V3"}
STARTS = ("model", "untied", "bf16", *FUSED)
"""Model folders: tied embeddings, untied ones, stored in bf16, expert by expert, under other names, with buffers."""


def make_backend(directory: Path, case: str, start: str = "model") -> Fsdp2Backend:
    layout, sharding, *more = case.split()
    settings = BackendSettings(
        max_length=PACK_LENGTH,
        precision="fp32",
        attention=cast(Any, layout),
        sharding=cast(Any, sharding),
        reduce_every_pack="every-pack" in more,
        offload="offload" in more,
        optimizer=OptimizerConfig(name="rmsprop"),
        learning_rate=0.01,
        total_steps=4,
    )
    return Fsdp2Backend(directory / start, settings, torch.device("cpu"))


def loaded_in_shares(directory: Path, name: str) -> dict[str, bool]:
    """Whether a backend that read its slices has the bits of the files, in its shards and in what it gathers."""
    backend = make_backend(directory, "packed full", start=name)
    expected = AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32)
    weights = dict(expected.named_parameters())
    return {
        "in shares": empty_model(directory / name) is not None,
        "half each": all(2 * shard.to_local().numel() <= shard.numel() + 64 for shard in backend._shards.values()),
        "names": backend._shards.keys() == weights.keys(),
        "weights": all(torch.equal(shard.full_tensor(), weights[name]) for name, shard in backend._shards.items()),
        "buffers": all(
            torch.equal(buffer, dict(expected.named_buffers())[name]) for name, buffer in backend._model.named_buffers()
        ),
    }


def gradients_of_a_step(backend: Fsdp2Backend, rank: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Returns the number of whole gradients that this rank keeps after each pack, and the sum's gathered gradients."""
    whole = []
    packs = one_step(ROWS).for_rank(rank, 2)
    for number, pack in enumerate(packs):
        batch = build_pack(pack, table_of(ROWS), pack_length=PACK_LENGTH, pad_id=0)
        backend.backward(backend.logps(batch).sum(), last_microbatch=number == len(packs) - 1)
        kept = [thing for thing in gc.get_objects() if type(thing) is torch.nn.Parameter]
        whole.append(sum(parameter.grad is not None for parameter in kept))
    return whole, {name: shard.grad.full_tensor() for name, shard in backend._shards.items() if shard.grad is not None}


def one_of_two_ranks(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(directory / "store"), 2), rank=rank, world_size=2)
    (directory / f"loaded-{rank}.json").write_text(json.dumps([loaded_in_shares(directory, name) for name in STARTS]))
    for case in ("packed full", "packed full every-pack"):
        whole, gradients = gradients_of_a_step(make_backend(directory, case), rank)
        (directory / f"{case}-whole-{rank}.json").write_text(json.dumps(whole))
        save_file(gradients, directory / f"{case}-gradients-{rank}")
    for case in CASES:
        backend = make_backend(directory, case)
        history = train(backend, ROWS, 2)
        backend.save(directory / f"{case}-of-rank-{rank}")
        backend.export_hf(directory / f"{case}-export")
        (directory / f"{case}-{rank}.json").write_text(json.dumps(history))
    batch = build_pack(one_step(ROWS).packs[0], table_of(ROWS), pack_length=PACK_LENGTH, pad_id=0)
    backend.backward(backend.logps(batch).sum() * (torch.inf if rank else 1.0), last_microbatch=True)
    try:
        backend.step()
    except FloatingPointError as error:
        (directory / f"error-{rank}").write_text(str(error))
    table = table_of(ROWS).append_column("pair_id", [[f"pair-{row}" for row in range(len(ROWS))]])
    reference = ReferenceScores(real=torch.zeros(len(ROWS)), generated=torch.zeros(len(ROWS)))
    if rank == 1:
        reference.real.fill_(torch.nan)
    shape = PackShape(pack_length=PACK_LENGTH, global_batch_pairs=len(ROWS), pad_id=0)
    before = {name: shard.full_tensor().clone() for name, shard in backend._shards.items()}
    try:
        train_step(backend, one_step(ROWS), table, shape, Objective(loss="logistic"), reference)
    except FloatingPointError as error:
        unchanged = all(torch.equal(before[name], shard.full_tensor()) for name, shard in backend._shards.items())
        (directory / f"stopped-{rank}").write_text(f"weights unchanged: {unchanged}; {error}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left behind."""
    directory = tmp_path_factory.mktemp("ranks")
    save_model(directory / "model", tiny_llama())
    save_model(directory / "untied", tiny_llama(tied=False))
    save_model(directory / "bf16", tiny_llama().bfloat16())
    for name, family in FUSED.items():
        save_model(directory / name, KINDS[family].make())
    run_ranks(one_of_two_ranks, (directory,), 2)
    return directory


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    with one_rank(tmp_path):
        yield


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("one_process")
def test_two_ranks_train_as_one_does(directory: Path, tmp_path: Path, case: str) -> None:
    """Three packs: rank 0 has two, rank 1 one and an empty one. Sums over ranks, divided by the step's pairs, must
    agree; a mean per rank would not. The checkpoint is written into one directory per rank and merged (as by Ray
    Train).
    """
    assert [len(list(filter(None, one_step(ROWS).for_rank(rank, 2)))) for rank in (0, 1)] == [2, 1]
    alone = make_backend(directory, case)
    expected = train(alone, ROWS, 2)
    for rank in (0, 1):
        found = json.loads((directory / f"{case}-{rank}.json").read_text())
        assert found == [pytest.approx(step, rel=1e-4) for step in expected]

    for rank in (0, 1):
        shutil.copytree(directory / f"{case}-of-rank-{rank}", tmp_path / "merged", dirs_exist_ok=True)
    resumed = make_backend(directory, case)
    resumed.load(tmp_path / "merged")
    assert resumed.steps_done == 2
    exported = dict(AutoModelForCausalLM.from_pretrained(directory / f"{case}-export").named_parameters())
    for name, weight in alone._shards.items():
        mine = resumed._shards[name].full_tensor()
        assert torch.equal(mine, exported[name])
        torch.testing.assert_close(mine, weight.full_tensor(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        torch.tensor(train(resumed, ROWS, 1)), torch.tensor(train(alone, ROWS, 1)), rtol=1e-3, atol=1e-4
    )


def test_gradients_reduced_with_every_pack_are_the_same_and_never_whole(directory: Path) -> None:
    """Of two packs a rank; reduced once, gradients are whole between the two."""
    for rank in (0, 1):
        expected, found = (
            load_file(directory / f"{case}-gradients-{rank}") for case in ("packed full", "packed full every-pack")
        )
        assert json.loads((directory / f"packed full-whole-{rank}.json").read_text()) == [len(expected), 0]
        assert json.loads((directory / f"packed full every-pack-whole-{rank}.json").read_text()) == [0, 0]
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_ranks_that_read_only_their_slices_have_the_bits_of_the_files(directory: Path) -> None:
    for rank in (0, 1):
        for found in json.loads((directory / f"loaded-{rank}.json").read_text()):
            assert all(found.values()), found


def test_a_bad_gradient_on_one_rank_raises_on_both(directory: Path) -> None:
    """A rank that stepped alone would wait for the other for ever."""
    for rank in (0, 1):
        assert "gradient norm is" in (directory / f"error-{rank}").read_text()


def test_a_bad_loss_on_one_rank_stops_both_before_the_optimizer_steps(directory: Path) -> None:
    """Only rank 1 sees numbers that are not finite; both name the pairs of the step and keep their weights."""
    for rank in (0, 1):
        message = (directory / f"stopped-{rank}").read_text()
        assert message.startswith("weights unchanged: True; the loss or a log-probability is not finite")
        assert sorted(message.rpartition(": ")[2].split(", ")) == sorted(f"pair-{row}" for row in range(len(ROWS)))
