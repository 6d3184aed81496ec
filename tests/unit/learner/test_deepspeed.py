"""DeepSpeed against FSDP2 on two gloo processes whose packs are unequal: losses, norms, weights, resume, export."""

import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from spin_ray.config.sections import LoraConfig, OptimizerConfig
from spin_ray.errors import ModelError
from spin_ray.learner.backends import make_backend
from spin_ray.learner.backends.base import BackendSettings, TrainBackend
from spin_ray.learner.distillation import ReadDivergence, ReadTop, TopTokens
from spin_ray.learner.losses import margins, pair_logps
from spin_ray.learner.packing import build_pack
from tests.support.learner_cases import (
    PACK_LENGTH,
    VOCAB,
    one_step,
    random_rows,
    save_model,
    table_of,
    tiny_llama,
    train,
)
from tests.support.ranks import run_ranks

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytest.importorskip("peft", reason="the extra `lora` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROWS = random_rows(0, trees=8)
CASES = (
    "full fp32 tied rmsprop",
    "shard_grad_op fp32 tied rmsprop",
    "full bf16 untied adamw",
    "shard_grad_op bf16 untied adamw",
    "full bf16 untied adamw lora",
    "shard_grad_op fp32 tied adamw lora",
)
"""Sharding (ZeRO-3, ZeRO-2), precision, embeddings, optimizer, and adapters instead of all weights."""


REST = math.log((VOCAB - 5) / VOCAB)


def backend_of(directory: Path, kind: str, case: str, **settings: Any) -> TrainBackend:
    sharding, precision, embeddings, optimizer, *lora = case.split()
    chosen = BackendSettings(
        kind=cast(Any, kind), max_length=PACK_LENGTH, precision=cast(Any, precision), sharding=cast(Any, sharding),
        optimizer=OptimizerConfig(name=cast(Any, optimizer), weight_decay=0.01, max_grad_norm=0.7),
        learning_rate=0.01, total_steps=8, **({"lora": LoraConfig(rank=4) if lora else None} | settings),
    )  # fmt: skip
    return make_backend(directory / embeddings, chosen, torch.device("cpu"))


def margins_at_step_0(backend: TrainBackend) -> float:
    """Largest |margin| of this rank before any step."""
    largest = 0.0
    for pack in one_step(ROWS).for_rank(dist.get_rank(), 2):
        batch = build_pack(pack, table_of(ROWS), pack_length=PACK_LENGTH, pad_id=0)
        reference = pair_logps(backend.score(batch), batch)
        margin = margins(*pair_logps(backend.logps(batch), batch), *reference, beta=5.0)
        backend.backward(0.0 * margin.sum(), last_microbatch=False)
        largest = max(largest, margin.abs().max().item() if len(margin) else 0.0)
    return largest


def one_of_two_ranks(rank: int, directory: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # Ray Train sets it too
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(directory / "store"), 2), rank=rank, world_size=2)
    whole_moves = moves_of_whole_models()
    for case in CASES:
        for kind in ("fsdp2", "deepspeed"):
            whole_moves.clear()
            backend = backend_of(directory, kind, case)
            found: dict[str, Any] = {"moved": list(whole_moves), "history": train(backend, ROWS, 3)}
            backend.export_hf(directory / f"{case} {kind}")
            if case in (CASES[0], CASES[2]):
                found["distilled"] = distilled(backend_of(directory, kind, case))
            if kind == "deepspeed":
                if "fp32" in case and "lora" in case:
                    found["continued"] = continued(backend, directory, case)
                found |= resumed(backend, directory, case)
            (directory / f"{case} {kind} {rank}.json").write_text(json.dumps(found))
    (directory / f"failure-{rank}.json").write_text(json.dumps(failures(directory)))
    dist.destroy_process_group()


def moves_of_whole_models() -> list[str]:
    """Returns a list that gets the name of every module that DeepSpeed moves to a device with its weights whole."""
    found, move = [], nn.Module.to

    def seen(module: nn.Module, *arguments: Any, **settings: Any) -> nn.Module:
        caller = sys._getframe(1).f_globals["__name__"]
        if caller.startswith("deepspeed.") and not all(hasattr(each, "ds_id") for each in module.parameters()):
            found.append(type(module).__name__)
        return move(module, *arguments, **settings)

    nn.Module.to = seen  # type: ignore[method-assign]
    return found


def distilled(backend: TrainBackend) -> list[list[float]]:
    """Two steps towards a teacher that finds all tokens alike; returns [loss over all ranks, gradient norm] of each.

    One rank has a pack without targets.
    """
    rows = [(prompt, real, []) for prompt, real, _ in ROWS]
    step, history = one_step(rows), []
    packs = step.for_rank(dist.get_rank(), 2)
    for _ in range(2):
        total = torch.zeros(())
        for number, pack in enumerate(packs):
            batch = build_pack(pack, table_of(rows), pack_length=PACK_LENGTH, pad_id=0)
            with torch.no_grad():
                top = backend.read(batch, ReadTop(5))
            alike = TopTokens(top.ids, torch.full_like(top.logps, -math.log(VOCAB)), torch.full_like(top.rest, REST))
            loss = backend.read(batch, ReadDivergence(alike)).sum() / step.num_real_tokens
            backend.backward(loss, last_microbatch=number == len(packs) - 1)
            total += loss.detach()
        dist.all_reduce(total)
        history.append([total.item(), backend.step().grad_norm])
    return history


def resumed(backend: TrainBackend, directory: Path, case: str) -> dict[str, Any]:
    """Two further steps without a break, and in another backend from a checkpoint; and what margins start as.

    Every rank saves into a folder of its own, as under Ray Train, and loads the union.
    """
    rank = dist.get_rank()
    backend.save(directory / f"{case} saved {rank}")
    on = train(backend, ROWS, 2)
    dist.barrier()
    if rank == 0:
        for other in (0, 1):
            shutil.copytree(directory / f"{case} saved {other}", directory / f"{case} merged", dirs_exist_ok=True)
    dist.barrier()
    again = backend_of(directory, "deepspeed", case, gradient_checkpointing=True)
    largest = margins_at_step_0(again)
    again.load(directory / f"{case} merged")
    found = {"on": on, "steps_done": again.steps_done, "resumed": train(again, ROWS, 2), "margin": largest}
    if "fp32" in case:
        offloaded = backend_of(directory, "deepspeed", case, offload=True)
        offloaded.load(directory / f"{case} merged")
        found["offloaded"] = train(offloaded, ROWS, 2)
    return found


def continued(backend: Any, directory: Path, case: str) -> dict[str, Any]:
    """Scores of what was trained, and of the adapter that it writes alone, by both backends."""
    alone, place = LoraConfig(rank=4, merge=False), directory / f"{case} adapter"
    backend._settings = replace(backend._settings, lora=alone)
    backend.export_hf(place)
    dist.barrier()
    batch = build_pack(one_step(ROWS).packs[0], table_of(ROWS), pack_length=PACK_LENGTH, pad_id=0)
    nexts = {kind: backend_of(directory, kind, case, lora=alone, adapter=place) for kind in ("deepspeed", "fsdp2")}
    return {kind: it.score(batch).tolist() for kind, it in {"trained": backend, **nexts}.items()} | {
        "files": sorted(file.name for file in place.iterdir())
    }


def failures(directory: Path) -> dict[str, Any]:
    """A gradient that is infinite on one rank."""
    backend = backend_of(directory, "deepspeed", CASES[0])
    batch = build_pack(one_step(ROWS).packs[0], table_of(ROWS), pack_length=PACK_LENGTH, pad_id=0)
    before = backend.score(batch)
    backend.backward(backend.logps(batch).sum() * (torch.inf if dist.get_rank() else 1.0), last_microbatch=True)
    try:
        backend.step()
    except FloatingPointError as error:
        return {"error": str(error), "unmoved": torch.equal(backend.score(batch), before)}
    return {}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left behind."""
    directory = tmp_path_factory.mktemp("ranks")
    for name, tied in (("tied", True), ("untied", False)):
        model = tiny_llama(tied=tied)
        save_model(directory / name, model.bfloat16().float())  # weights that bf16 can hold, as an iterate has
    run_ranks(one_of_two_ranks, (directory,), 2)
    return directory


def result(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / f"{name}.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_with_zero_3_no_card_holds_the_whole_model_at_the_start(directory: Path, case: str) -> None:
    """ZeRO-2 keeps whole weights on every card."""
    assert result(directory, f"{case} deepspeed 0")["moved"] == ([] if case.startswith("full") else ["_Scorer"])


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_trains_as_fsdp2_does(directory: Path, case: str) -> None:
    """They agree to rounding, in bf16 too; where gradients are tiny, RMSProp makes whole steps (0.01) of it. Adapters
    start from random numbers that bf16 does not hold, and which DeepSpeed rounds.
    """
    relative, absolute = (5e-3, 0.02) if "bf16" in case and "lora" in case else (1e-4, 1e-3)
    expected = result(directory, f"{case} fsdp2 0")["history"]
    for rank in (0, 1):
        found = result(directory, f"{case} deepspeed {rank}")["history"]
        assert found == [pytest.approx(step, rel=relative) for step in expected]
    start = dict(AutoModelForCausalLM.from_pretrained(directory / case.split()[2]).named_parameters())
    weights = dict(AutoModelForCausalLM.from_pretrained(directory / f"{case} deepspeed").named_parameters())
    for name, weight in AutoModelForCausalLM.from_pretrained(directory / f"{case} fsdp2").named_parameters():
        assert weights[name].dtype == weight.dtype
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=absolute)
        moved = (weights[name].float() - start[name]).abs().max()
        assert moved > 0.01 if "lora" not in case or name.endswith("_proj.weight") else moved == 0, name


def test_the_next_iteration_begins_with_the_adapter_that_deepspeed_wrote(directory: Path) -> None:
    """With ``train.lora.merge: false``: DeepSpeed trains it further, FSDP2 scores the reference with it."""
    found = result(directory, f"{CASES[5]} deepspeed 0")["continued"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {*found["files"]}
    assert "model.safetensors" not in found["files"]
    for kind in ("deepspeed", "fsdp2"):
        assert found[kind] == pytest.approx(found["trained"], abs=1e-4)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_deepspeed_distils_as_fsdp2_does(directory: Path, case: str) -> None:
    """The teacher's log-probabilities stay fp32 in bf16 training: rounded, the first loss would be 1 % off."""
    expected = result(directory, f"{case} fsdp2 0")["distilled"]
    assert 0 < expected[1][0] < expected[0][0]
    for rank in (0, 1):
        found = result(directory, f"{case} deepspeed {rank}")["distilled"]
        assert found == [pytest.approx(step, rel=1e-3 if "bf16" in case else 1e-4) for step in expected]


@pytest.mark.parametrize("case", CASES)
def test_resumed_deepspeed_training_is_bitwise_the_uninterrupted_one(directory: Path, case: str) -> None:
    """Resumed with activations recomputed, which must not change a bit either."""
    for rank in (0, 1):
        found = result(directory, f"{case} deepspeed {rank}")
        assert found["steps_done"] == 3
        assert found["resumed"] == found["on"]


@pytest.mark.parametrize("case", [case for case in CASES if "fp32" in case])
def test_offloaded_deepspeed_training_is_the_same_to_rounding(directory: Path, case: str) -> None:
    """With states in the CPU's memory DeepSpeed sums the norm in another order."""
    for rank in (0, 1):
        found = result(directory, f"{case} deepspeed {rank}")
        assert found["offloaded"] == [pytest.approx(step, rel=1e-6) for step in found["on"]]


@pytest.mark.parametrize("case", CASES)
def test_margins_are_exactly_0_at_step_0(directory: Path, case: str) -> None:
    assert [result(directory, f"{case} deepspeed {rank}")["margin"] for rank in (0, 1)] == [0, 0]


def test_a_bad_gradient_on_one_rank_raises_on_both_and_moves_nothing(directory: Path) -> None:
    for rank in (0, 1):
        found = result(directory, f"failure-{rank}")
        assert "not finite at optimizer step 0" in found["error"]
        assert found["unmoved"]


def test_without_deepspeed_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModelError, match=r"spin-ray\[deepspeed\]"):
        backend_of(tmp_path, "deepspeed", CASES[0])


def test_deepspeed_refuses_what_would_be_scored_compiled_and_trained_uncompiled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DeepSpeed trains uncompiled"):
        backend_of(tmp_path, "deepspeed", CASES[0], compile=True)
