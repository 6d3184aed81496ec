"""What an own optimizer keeps goes through a checkpoint, and its weights to use are those exported."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ConfigError
from spin_ray.learner.backends import make_backend
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.optimizer_state import load_checkpoint, save_checkpoint
from tests.support import own_optimizers
from tests.support.learner_cases import one_rank, random_rows, save_model, tiny_llama, train

HERE = own_optimizers.__name__


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "model", tiny_llama())


def backend_with(model: Path, name: str) -> Fsdp2Backend:
    optimizer = OptimizerConfig(name=f"{HERE}:{name}", schedule="constant", warmup_fraction=0)
    settings = BackendSettings(max_length=48, precision="fp32", optimizer=optimizer, learning_rate=0.01, total_steps=6)
    backend = make_backend(model, settings, torch.device("cpu"))
    assert isinstance(backend, Fsdp2Backend)
    return backend


@pytest.mark.parametrize("name", ["CountsInGroups", "StartsLate", "TwoModes"])
def test_training_resumed_at_step_3_is_bitwise_the_uninterrupted_one(model: Path, tmp_path: Path, name: str) -> None:
    rows = random_rows(0, 3)
    whole, resumed = (backend_with(model, name) for _ in range(2))
    train(whole, rows, 3)
    whole.save(tmp_path / "checkpoint")
    expected = train(whole, rows, 3)
    resumed.load(tmp_path / "checkpoint")
    assert train(resumed, rows, 3) == expected
    assert resumed.steps_done == 6
    for backend, folder in ((whole, "whole"), (resumed, "resumed")):
        (tmp_path / folder).mkdir()
        backend.export_hf(tmp_path / folder)
    assert_equal(weights_in(tmp_path / "whole"), weights_in(tmp_path / "resumed"))


def test_an_optimizer_with_modes_exports_its_weights_to_use_and_trains_on(model: Path, tmp_path: Path) -> None:
    """After one step x is z, and y, at which it trains, is between x and the start; so eval() shows as a difference."""
    rows = random_rows(0, 3)
    backend = backend_with(model, "TwoModes")
    train(backend, rows, 2)
    optimizer = backend._optimizer
    assert isinstance(optimizer, own_optimizers.TwoModes)
    (tmp_path / "exported").mkdir()
    backend.export_hf(tmp_path / "exported")
    assert optimizer.param_groups[0]["training"]
    optimizer.eval()
    exported, in_use = weights_in(tmp_path / "exported"), backend._shards
    name = "model.layers.0.mlp.up_proj.weight"
    (shard,) = [shard for key, shard in in_use.items() if key.endswith(name)]
    torch.testing.assert_close(exported[name], whole(shard))
    optimizer.train()
    assert (exported[name] - whole(shard)).abs().max() > 1e-5
    train(backend, rows, 1)


def test_a_checkpoint_of_more_groups_is_refused(tmp_path: Path) -> None:
    weights = {name: nn.Parameter(torch.ones(2)) for name in "ab"}
    name = f"{HERE}:CountsInGroups"
    two = own_optimizers.CountsInGroups([{"params": [weight]} for weight in weights.values()], 0.1)
    one = own_optimizers.CountsInGroups(weights.values(), 0.1)
    save_checkpoint(tmp_path, weights, two, name, 0)
    with pytest.raises(ConfigError, match="has 1 parameter groups, and more in its checkpoint"):
        load_checkpoint(tmp_path, weights, one, name)


def test_the_optimizers_by_name_keep_no_groups(model: Path, tmp_path: Path) -> None:
    weights = {"a": nn.Parameter(torch.ones(2))}
    save_checkpoint(tmp_path, weights, torch.optim.AdamW(weights.values()), "adamw", 0)
    assert not [key for key in FileSystemReader(tmp_path).read_metadata().planner_data if key.startswith("groups")]


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def whole(shard: Tensor) -> Tensor:
    return getattr(shard, "full_tensor", lambda: shard)().detach()


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)
