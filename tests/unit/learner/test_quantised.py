"""Adapters on frozen weights of 4 and 8 bits, against transformers and PEFT in a plain loop."""

import copy
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor

from spin_ray.config.sections import LoraConfig, OptimizerConfig
from spin_ray.learner import quantised
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.losses import margins, pair_logps
from spin_ray.learner.scoring import ResponseScorer
from tests.support.learner_cases import batches_of, one_rank, random_rows, save_model, tiny_llama, train
from tests.support.ranks import run_ranks

torch.set_num_threads(1)
ROWS = random_rows(0, trees=6)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("quantised")
    with one_rank(folder):
        yield save_model(folder / "model", tiny_llama(hidden=64))


def backend_of(model_dir: Path, base: Any, **changes: Any) -> Fsdp2Backend:
    optimizer = OptimizerConfig(name="adamw", schedule="constant", warmup_fraction=0, max_grad_norm=1e9)
    settings = BackendSettings(
        max_length=48, precision="fp32", learning_rate=0.01, total_steps=8, base=base,
        **({"optimizer": optimizer, "lora": LoraConfig(rank=4, alpha=6, base=base, merge=False)} | changes),
    )  # fmt: skip
    return Fsdp2Backend(model_dir, settings, torch.device("cpu"))


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_adapters_train_on_quantised_weights_and_the_next_iteration_scores_the_same(
    base: Any, model_dir: Path, tmp_path: Path
) -> None:
    """Step 0 is the frozen model's own; the exported adapter, scored on the same weights, is what was trained."""
    pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")
    backend = backend_of(model_dir, base)
    frozen = [weight for weight in backend._model.parameters() if not weight.is_floating_point()]
    assert len(frozen) == 14 and all(weight.element_size() == 1 for weight in frozen)
    plain = quantised.load_quantised(
        model_dir, base, dtype=torch.float32, device=torch.device("cpu"), trust_remote_code=False
    )
    scorer = ResponseScorer(plain)
    batch = batches_of(ROWS)[0]
    with torch.no_grad():
        torch.testing.assert_close(backend.score(batch), scorer(batch), rtol=1e-5, atol=1e-4)
    before = backend.score(batch)
    reference = pair_logps(before, batch)
    assert not margins(*pair_logps(backend.logps(batch), batch), *reference, beta=5.0).any()
    weights = copy.deepcopy([weight.detach().clone() for weight in frozen])

    train(backend, ROWS, 2)
    assert all(torch.equal(weight, kept) for weight, kept in zip(frozen, weights, strict=True))
    assert (backend.score(batch) - before).abs().max() > 1e-3
    backend.export_hf(tmp_path)
    again = backend_of(model_dir, base, optimizer=None, lora=None, adapter=tmp_path)
    torch.testing.assert_close(again.score(batch), backend.score(batch), rtol=1e-5, atol=1e-4)


def _one_of_two_ranks(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "two"), 2), rank=rank, world_size=2)
    found = {base: train(backend_of(folder / "model", base), ROWS, 2) for base in ("nf4", "int8")}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_adapters_on_quantised_weights_as_one_does(model_dir: Path) -> None:
    """Each rank holds all frozen integers, and its shard of the rest."""
    pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")
    run_ranks(_one_of_two_ranks, (model_dir.parent,), 2)
    expected = {base: train(backend_of(model_dir, base), ROWS, 2) for base in ("nf4", "int8")}
    for rank in (0, 1):
        found = json.loads((model_dir.parent / f"{rank}.json").read_text())
        for base, history in expected.items():
            assert found[base] == [pytest.approx(step, rel=1e-5) for step in history]


def test_adamw_of_8_bits_steps_as_in_a_plain_loop_and_resumes_bit_for_bit(model_dir: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")
    optimizer = OptimizerConfig(name="adamw_8bit", schedule="constant", warmup_fraction=0, max_grad_norm=1e9)
    make = partial(backend_of, model_dir, "bf16", optimizer=optimizer, lora=None)
    backend, plain = make(), tiny_llama(hidden=64)
    parameters = dict(plain.named_parameters())
    theirs = library.optim.AdamW8bit(parameters.values(), lr=0.01, weight_decay=0)
    for _ in range(3):
        for name, weight in parameters.items():
            weight.grad = torch.sin(weight.detach() * 7)
            backend._shards[name].grad = distribute_tensor(weight.grad, *placed(backend._shards[name]))
        backend.step()
        theirs.step()
    moments = [state["state1"].dtype for state in theirs.state.values()]
    assert torch.uint8 in moments, "the largest weights have moments of a byte"
    for name, weight in parameters.items():
        assert torch.equal(backend._shards[name].full_tensor(), weight), name

    train(backend, ROWS, 1)
    backend.save(tmp_path / "checkpoint")
    resumed = make()
    resumed.load(tmp_path / "checkpoint")
    assert train(resumed, ROWS, 2) == train(backend, ROWS, 2)


def placed(shard: Any) -> tuple[Any, Any]:
    return shard.device_mesh, shard.placements
