"""FLOPs, traffic and memory of scoring and training: by hand on a tiny decoder, and which change makes them grow."""

import gc
import json
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import Mesh
from spin_ray.learner.attention.rule import visible
from spin_ray.learner.backends import make_backend
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.optimizers import make_optimizer
from spin_ray.learner.packing import build_pack, plan_epoch
from spin_ray.learner.scoring import ResponseScorer
from spin_ray.planning.hardware import GB
from spin_ray.planning.learner_cost import (
    WORKERS_START_S,
    evaluation_cost,
    learner_memory,
    moments_of,
    offload_warning,
    pack_flops,
    scoring_cost,
    settle_checkpointing,
    training_cost,
)
from spin_ray.planning.model_shape import MISTRAL_7B, ModelShape
from spin_ray.planning.stage_cost import RUNTIME
from spin_ray.planning.traffic import step_collectives
from spin_ray.planning.work import Trees, epoch_packs
from tests.support.learner_cases import (
    batches_of,
    lengths_of,
    one_rank,
    random_rows,
    save_model,
    table_of,
    tiny_llama,
)
from tests.support.planning_cases import (
    A100,
    ADAMW,
    ONE_PACK,
    PAPER_WORK,
    RMSPROP,
    TINY,
    TWO_PACKS,
    ZEPHYR,
    flat,
    pair_packs,
    tiny_config,
)
from tests.support.ranks import run_ranks

# FLOPs and traffic, by hand


def test_flops_of_a_pack_by_hand():
    """Below the head 2 layers · (2·576·3 tokens + 4·8·9 pairs) = 7488; the head 2·8·10·2 targets = 320.

    Backward doubles the forward pass, checkpointing repeats it, and the head is always computed again.
    """
    plain, repeated = tiny_config(), tiny_config(gradient_checkpointing=True)
    assert pack_flops(plain, TINY, 3, 2, 9, backward=False) == 7488 + 320
    assert pack_flops(plain, TINY, 3, 2, 9, backward=True) == 3 * 7488 + 4 * 320
    assert pack_flops(repeated, TINY, 3, 2, 9, backward=True) == 4 * 7488 + 4 * 320
    assert pack_flops(repeated, TINY, 3, 2, 9, backward=False) == 7488 + 320


def test_a_large_model_costs_about_6_flops_per_parameter_and_token():
    """6N is the usual estimate (arXiv 2001.08361); attention adds some, embeddings are not multiplied."""
    tokens = ZEPHYR.train.pack_length
    plain = ZEPHYR.with_train(gradient_checkpointing=False)
    flops = pack_flops(plain, MISTRAL_7B, tokens, tokens, tokens**2 / 2, backward=True)
    assert flops / (6 * MISTRAL_7B.parameters * tokens) == pytest.approx(1.0, abs=0.2)


FOUR_TREES = Trees(count=4, prompt=40, responses=(30, 30))
ALIKE = [(40 * [number], 30 * [5], 30 * [6]) for number in range(4)]
"""Rows of ``FOUR_TREES``."""


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("pack_length", [112, 448])
def test_the_flops_of_a_cpu_are_those_that_torch_counts(backward: bool, pack_length: int, tmp_path: Path):
    """One tree a pack or four: attention takes 45 % below the head, and trees do not see each other."""
    model = tiny_llama(tied=False)
    shape = ModelShape.from_folder(save_model(tmp_path / "model", model))
    scorer, steps = ResponseScorer(model), plan_epoch(
        lengths_of(ALIKE), pack_length=pack_length, global_batch_pairs=4, seed=0, epoch=0
    )  # fmt: skip
    batches = [
        build_pack(pack, table_of(ALIKE), pack_length=pack_length, pad_id=0) for step in steps for pack in step.packs
    ]
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        for batch in batches:
            logps = scorer(batch)
            if backward:
                logps.sum().backward()
    config = tiny_config(pack_length=pack_length, global_batch_pairs=4)
    packs = epoch_packs(config, FOUR_TREES, config.train.workers)
    price = partial(training_cost, epochs=1, optimizer=RMSPROP) if backward else scoring_cost
    assert price(config, shape, A100, packs, ranks=flat(config)).flops == pytest.approx(
        counter.get_total_flops(), rel=0.08
    )


def test_gpus_multiply_the_pairs_of_tokens_that_see_each_other():
    """Counted by the rule of visibility, which the kernels have; longer packs of the same trees see no more."""
    batch = build_pack(((0,), (1,), (2,), (3,)), table_of(ALIKE), pack_length=448, pad_id=0)
    seen = int(visible(batch)[: 4 * 100, : 4 * 100].sum())
    flops = []
    for length in (448, 4480):
        config = tiny_config(pack_length=length, global_batch_pairs=4, resources={"gpus": 1})
        packs = epoch_packs(config, FOUR_TREES, config.train.workers)
        assert packs.steps * packs.per_step * packs.visible == pytest.approx(seen, rel=0.03), "less half the diagonal"
        padded = packs.steps * packs.per_step * packs.length
        cost = scoring_cost(config, TINY, A100, packs, flat(config)).flops
        flops.append(cost - 2 * 2 * TINY.active_matmuls * padded)
        heads = 4 * TINY.head_flops(60)
        assert flops[-1] == pytest.approx(2 * 4 * TINY.q * seen + heads, rel=0.03)
    assert flops[0] == pytest.approx(flops[1])


def test_traffic_of_a_step_by_hand():
    """Two ranks, 2 packs, 2 layers of 592 parameters and 168 in the root, half of them elsewhere; weights take 2 bytes.

    In full each pack gathers the layers twice and the root once; else everything once. Gradients take 4 bytes. Scoring
    keeps the root.
    """
    full, once = tiny_config(workers=2), tiny_config(workers=2, sharding="shard_grad_op")
    layers, whole = 2 * 592, 1352

    def sent(config: SpinConfig, *, backward: bool) -> float:
        ranks = flat(config)
        return sum(it.sent for it in step_collectives(config, TINY, ranks, 2, 0.0, backward=backward))

    assert sent(full, backward=True) == (2 * 2 * (2 * layers + 168) + 4 * whole) / 2
    assert sent(once, backward=True) == whole / 2 * (2 + 4)
    assert sent(full, backward=False) == layers / 2 * 2 * 2
    assert sent(tiny_config(), backward=True) == 0


def test_the_evaluation_of_the_second_iterate_is_scored_by_three_models():
    """Rows of 130 + 256 + 2 · 256 tokens twice; from the second iterate on θ_0 scores 130 + 256 + 256 more."""
    first, second, third = (
        evaluation_cost(ZEPHYR, MISTRAL_7B, A100, PAPER_WORK, iterate, flat(ZEPHYR)) for iterate in (1, 2, 3)
    )
    assert (first.tokens, second.tokens) == (500 * 2 * 898, 500 * (2 * 898 + 642))
    share = (second.tokens - first.tokens) / first.tokens
    assert second.flops / first.flops == pytest.approx(1 + share, rel=0.03)
    assert second.seconds - WORKERS_START_S > 1.2 * (first.seconds - WORKERS_START_S)
    assert (third, second.memory) == (second, first.memory)


# Memory, by hand


def test_memory_of_a_train_worker_by_hand():
    """Half of 1352 parameters at 4 bytes each is 2704.

    Gathered: 168 + 2·592 in bf16, two fp32 buffers of 592. Activations of a layer, 3 tokens:
    2·8·8 (norms) + 4·8·2 (attention) + 4·16·2 (feed-forward) = 320 bytes a token; then 2 targets · 8 · 2, a mask of
    3² · 3 and 256 · 10 logits three times in fp32.
    """
    rest = 2 * 8 * 2 + 9 * 3 + 256 * 10 * 12
    expected = {
        "weights": 2704, "optimizer": 2704, "gradients": 2704, "whole gradients": 5408,
        "gathered weights": 2 * (168 + 2 * 592) + 2 * 4 * 592, "activations": 2 * 3 * 320 + rest, "runtime": RUNTIME,
    }  # fmt: skip
    config = tiny_config(workers=2)
    assert learner_memory(config, TINY, TWO_PACKS, optimizer=RMSPROP, backward=True) == expected
    checkpointed = tiny_config(workers=2, gradient_checkpointing=True)
    kept = learner_memory(checkpointed, TINY, TWO_PACKS, optimizer=RMSPROP, backward=True)["activations"]
    assert kept == 2 * 3 * 8 * 2 + 3 * 320 + rest


def test_states_are_12_bytes_per_parameter_with_rmsprop_and_16_with_adamw():
    for optimizer, size in [(RMSPROP, 12), (ADAMW, 16)]:
        memory = learner_memory(tiny_config(), TINY, ONE_PACK, optimizer=optimizer, backward=True)
        assert sum(memory[name] for name in ("weights", "gradients", "optimizer")) == size * 1352


def test_a_rank_with_one_pack_a_step_keeps_no_whole_gradients():
    assert "whole gradients" not in learner_memory(tiny_config(), TINY, ONE_PACK, optimizer=RMSPROP, backward=True)


def _count_zero_bytes(rank: int, folder: Path, precision: str, sharding: str) -> None:
    """Writes the bytes of all tensors after a step of DeepSpeed and a second backward pass."""
    settings = BackendSettings(
        kind="deepspeed", max_length=48, precision=precision, sharding=sharding, optimizer=RMSPROP,
        learning_rate=1e-5, total_steps=2, reduce_every_pack=True,
    )  # fmt: skip
    with one_rank(folder), pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")
        backend = make_backend(folder / "model", settings, torch.device("cpu"))
        batch = batches_of(random_rows(0, trees=2))[0]
        for _ in range(2):
            backend.backward(backend.logps(batch).sum(), last_microbatch=True)
            held = _bytes_of_tensors()
            backend.step()
    (folder / "bytes.json").write_text(json.dumps(held))


def _bytes_of_tensors() -> int:
    gc.collect()
    tensors = [it for it in gc.get_objects() if type(it) in (torch.Tensor, torch.nn.Parameter)]
    return sum({it.untyped_storage().data_ptr(): it.untyped_storage().nbytes() for it in tensors}.values())


class Made(TorchDispatchMode):
    """The bytes of memory that is taken meanwhile; ``most`` at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # asked again for its local tensors
        result = func(*args, **(kwargs or {}))
        given = {it.untyped_storage()._cdata for it in tree_leaves((args, kwargs)) if isinstance(it, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known | given:
                    self._known.add(storage._cdata)
                    self._alive += storage.nbytes()
                    self.most = max(self.most, self._alive)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self._alive -= size


def _count_fsdp2_bytes(rank: int, folder: Path, packs: int) -> None:
    """Writes the most bytes that are taken in the last pack but one of a second step, or in its only pack."""
    settings = BackendSettings(
        max_length=48, precision="bf16", optimizer=RMSPROP, learning_rate=1e-5, total_steps=2, reduce_every_pack=True
    )
    with one_rank(folder):
        backend = make_backend(folder / "model", settings, torch.device("cpu"))
        batch = batches_of(random_rows(0, trees=1))[0]
        for _ in range(2):
            for number in range(packs):
                if number == max(0, packs - 2):
                    gathered = backend.logps(batch) if packs == 1 else None  # noqa: F841
                    held = _bytes_of_tensors()
                    with Made() as made:
                        backend.backward(backend.logps(batch).sum(), last_microbatch=False)
                else:
                    backend.backward(backend.logps(batch).sum(), last_microbatch=number == packs - 1)
            backend.step()
    (folder / "bytes.json").write_text(json.dumps(held + made.most))


@pytest.mark.slow
@pytest.mark.parametrize("packs", [3, 1])
@pytest.mark.parametrize(("vocab", "inner"), [(4096, 64), (64, 4096)])
def test_one_rank_needs_the_bytes_of_the_plan_while_it_sums_gradients(
    vocab: int, inner: int, packs: int, tmp_path: Path
):
    """The most is needed for the root with a large vocabulary, else for a layer, whose activations are small here.

    torch copies gradients into two buffers also without another rank.
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=512, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=False,
        )
    )  # fmt: skip
    folder = save_model(tmp_path / "model", model.eval())
    run_ranks(_count_fsdp2_bytes, (tmp_path, packs), 1)
    config = tiny_config(pack_length=32, reduce_every_pack=True)
    several = replace(ONE_PACK, per_rank=packs, per_rank_at_most=packs, length=32, targets=16)
    memory = learner_memory(config, ModelShape.from_folder(folder), several, optimizer=RMSPROP, backward=True)
    needed = sum(memory.values()) - RUNTIME
    assert json.loads((tmp_path / "bytes.json").read_text()) == pytest.approx(needed, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "precision"), [("full", "bf16"), ("full", "fp32"), ("shard_grad_op", "bf16")])
def test_zero_keeps_the_bytes_of_the_plan(sharding: str, precision: str, tmp_path: Path):
    """One rank: 12 bytes a parameter of fp32 states and the weights to compute with, and ZeRO-3's bucket."""
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    model = tiny_llama(tied=False, layers=8, hidden=256)
    folder = save_model(tmp_path / "model", model)
    run_ranks(_count_zero_bytes, (tmp_path, precision, sharding), 1)
    found = json.loads((tmp_path / "bytes.json").read_text())
    config = tiny_config(backend="deepspeed", precision=precision, sharding=sharding)
    shape = ModelShape.from_folder(folder)
    memory = learner_memory(config, shape, ONE_PACK, optimizer=RMSPROP, backward=True)
    bucket = memory.get("gradient bucket", 0.0)
    states = sum(memory[name] for name in ("weights", "optimizer", "gradients"))
    computed = 0.0 if sharding == "full" else memory["gathered weights"]
    assert found - bucket == pytest.approx(states + computed, rel=0.02)


def test_zero_3_keeps_its_copy_in_the_cpus_memory_when_offloaded():
    settings = {"backend": "deepspeed", "resources": {"gpus": 1}, "compile": False}
    there, away = (
        learner_memory(tiny_config(**settings, offload=off), TINY, ONE_PACK, optimizer=RMSPROP, backward=True)
        for off in (False, True)
    )
    assert there["weights"] == (4 + 2) * 1352 and "weights" not in away
    assert there["gradient bucket"] == away["gradient bucket"] == 2e9


def test_zero_3_sums_gradients_in_copies_of_its_bucket_and_not_of_a_unit():
    """MISTRAL_7B's embeddings and head are 2 · 131M numbers, a layer 218M; a bucket is 500M. A vocabulary of 256,000
    makes a matrix of 1.05 · 10⁹, reduced alone.
    """
    large = replace(MISTRAL_7B, vocab=256_000)
    settings = {"workers": 8, "compile": False, "sharding": "full"}
    fsdp2, zero_3 = (ZEPHYR.with_train(backend=kind, **settings) for kind in ("fsdp2", "deepspeed"))

    def summed(config: SpinConfig, shape: ModelShape) -> float:
        several, one = (
            learner_memory(config, shape, ONE_PACK, optimizer=RMSPROP, backward=both)["gathered weights"]
            for both in (True, False)
        )
        return several - one

    assert (summed(fsdp2, MISTRAL_7B), summed(zero_3, MISTRAL_7B)) == (8 * MISTRAL_7B.root, 2e9)
    assert (summed(fsdp2, large), summed(zero_3, large)) == (8 * large.root, 4 * 4096 * 256_000)


def test_offloaded_gradients_of_several_packs_are_told_with_the_cure():
    """torch copies a later pack's gradients to pageable memory and adds them there: 29 GB of a 7B."""
    config = ZEPHYR.with_train(workers=1, offload=True, compile=False)
    warned = partial(offload_warning, trained=MISTRAL_7B.parameters, mesh=Mesh())
    told = warned(config, packs=2.2)
    assert told and "29.0 GB" in told and "in about 3 packs" in told and "train.pack_length" in told
    assert warned(config, packs=1) is None
    assert warned(config.with_train(offload=False), packs=2) is None
    assert warned(config.with_train(reduce_every_pack=False), packs=2) is None
    assert warned(config, packs=2, trained=4e7) is None, "adapters"
    assert "14.5 GB" in (warned(config, packs=2, mesh=Mesh(shard=2)) or "")
    assert warned(config, packs=2, mesh=Mesh(replicate=2, shard=8)) is None, "sums stay on the GPU"


def test_copies_of_an_offloaded_model_sum_gradients_on_the_gpu():
    """torch moves them to the host with the last pack of a step, after it has summed those of the copies."""
    config = ZEPHYR.with_train(workers=16, offload=True)

    def gradients(mesh: Mesh, packs: Any = TWO_PACKS) -> float:
        memory = learner_memory(config, MISTRAL_7B, packs, optimizer=RMSPROP, mesh=mesh, backward=True)
        return memory.get("gradients", 0.0)

    assert gradients(Mesh(replicate=2, shard=8)) == pytest.approx(4 * MISTRAL_7B.parameters / 8, rel=0.01)
    assert gradients(Mesh(shard=16)) == gradients(Mesh(replicate=2, shard=8), ONE_PACK) == 0


def test_evaluation_holds_neither_gradients_nor_optimizer():
    memory = learner_memory(tiny_config(), TINY, TWO_PACKS, optimizer=None, backward=False)
    assert memory.keys() == {"weights", "gathered weights", "activations", "runtime"}


@pytest.mark.parametrize("how", [{"reduce_every_pack": True}, {"resources": {"gpus": 1}}])
def test_gradients_reduced_with_every_pack_are_never_whole(how):
    """As they are on GPUs, unless the recipe says otherwise."""
    config = tiny_config(**how)
    assert "whole gradients" not in learner_memory(config, TINY, TWO_PACKS, optimizer=RMSPROP, backward=True)


def test_shard_grad_op_holds_a_whole_copy_of_the_weights():
    config = ZEPHYR.with_train(sharding="shard_grad_op")
    full, once = (
        learner_memory(c, MISTRAL_7B, TWO_PACKS, optimizer=RMSPROP, backward=True)["gathered weights"]
        for c in (ZEPHYR, config)
    )
    assert once - full == 2 * 30 * MISTRAL_7B.layer, "two of 32 layers are there anyway"


@pytest.mark.parametrize("settings", [RMSPROP, ADAMW])
def test_numbers_per_parameter_are_those_that_the_learners_optimizer_keeps(settings):
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    optimizer = make_optimizer([weight], settings, 1e-3)
    optimizer.step()
    kept = [value for value in optimizer.state[weight].values() if value.shape == weight.shape]
    assert len(kept) == moments_of(settings)
    assert {value.dtype for value in kept} == {torch.float32}


# More or less of it


def test_checkpointing_costs_time_and_saves_memory():
    cheap, dear = (
        training_cost(c, MISTRAL_7B, A100, pair_packs(c, PAPER_WORK, 0), 2, RMSPROP, flat(c))
        for c in (ZEPHYR.with_train(gradient_checkpointing=on) for on in (True, False))
    )
    assert cheap.seconds > dear.seconds and cheap.needed < dear.needed


def test_activations_that_fit_are_not_computed_again():
    """zephyr_7b: 28 GiB of activations at 4096 tokens, about 46 GB in all, on cards of 80 and 40 GB."""
    assert ZEPHYR.train.gradient_checkpointing == "auto"
    eight = Mesh(shard=8)
    for room, on in ((80 * GB, False), (40 * GB, True)):
        assert settle_checkpointing(ZEPHYR, MISTRAL_7B, room, RMSPROP, eight).train.gradient_checkpointing is on
    given = ZEPHYR.with_train(gradient_checkpointing=True)
    assert settle_checkpointing(given, MISTRAL_7B, 80 * GB, RMSPROP, eight) is given
    on_cpu = tiny_config()
    assert settle_checkpointing(on_cpu, TINY, 1.0, RMSPROP, Mesh()).train.gradient_checkpointing is False


def test_an_epoch_more_costs_its_steps_and_no_second_start_of_the_workers():
    """One start and e epochs: 2·cost(2 epochs) - cost(4 epochs) is the start."""
    config = tiny_config()
    one, two, four = (
        training_cost(config, TINY, A100, ONE_PACK, epochs, RMSPROP, flat(config)).seconds for epochs in (1, 2, 4)
    )
    assert 2 * two - four == pytest.approx(WORKERS_START_S)
    assert one > WORKERS_START_S


def test_more_workers_need_less_memory_and_time():
    costs = []
    for workers in (8, 16, 32):
        config = ZEPHYR.with_train(workers=workers)
        costs.append(
            training_cost(config, MISTRAL_7B, A100, pair_packs(config, PAPER_WORK, 0), 2, RMSPROP, flat(config))
        )
    assert [c.needed for c in costs] == sorted((c.needed for c in costs), reverse=True)
    assert costs[0].seconds > costs[1].seconds >= costs[2].seconds


def test_a_slow_link_makes_gathering_the_bound_and_shard_grad_op_the_cure():
    slow = replace(A100, link=1e9)
    times = {}
    for sharding in ("full", "shard_grad_op"):
        config = ZEPHYR.with_train(sharding=sharding)
        cost = training_cost(config, MISTRAL_7B, slow, pair_packs(config, PAPER_WORK, 0), 2, RMSPROP, flat(config))
        assert cost.bound == "gathering weights"
        times[sharding] = cost.seconds
    assert times["shard_grad_op"] < times["full"]
