"""An algorithm, a loss, an optimizer and a backend from outside of the package, as docs/extending.md says."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ConfigError
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.learner.backends import check_backend, make_backend
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.losses import LOSSES, MarginLoss, PairValues, resolve_loss
from spin_ray.learner.optimizers import make_optimizer
from spin_ray.learner.step import Objective
from spin_ray.loop import driver
from spin_ray.loop.algorithms import table
from spin_ray.loop.algorithms.table import check_algorithm
from spin_ray.loop.stages.training import stage as training
from spin_ray.run_dir.events import read_json_lines
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.schemas import PAIR_SCHEMA
from spin_ray.run_dir.storage import Storage
from tests.support import small_run
from tests.support.fakes import rows_of, write_rows
from tests.support.learner_cases import logp_alone, one_rank, random_rows, save_model, tiny_llama, train

MODULE = '''
from functools import partialmethod

import pyarrow as pa
import torch
from torch.nn import functional

from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.loop.algorithms.base import Algorithm, PlayedPrompts, margin_objective, pair_table
from spin_ray.loop.stages import pairs
from spin_ray.run_dir.schemas import TOKEN_IDS


def squared_hinge(margin):
    return functional.relu(1 - margin).square()


class ReferenceFree:
    """A Loss of log p(y) against log p(y') alone."""

    needs_reference = False
    needs_wins = False
    per = "pair"

    def __call__(self, policy, reference, wins, beta):
        assert reference is None and wins is None
        return functional.softplus(-beta * (policy.real - policy.generated)).sum()

    def margin(self, policy, reference, beta):
        return None


reference_free = ReferenceFree()
without_two = type("WithoutTwo", (), {"needs_reference": True, "needs_wins": False, "__call__": print})()
attributes = {"needs_reference": True, "needs_wins": False, "per": "pair"}
numbered = type("Numbered", (), {**attributes, "margin": 1.0, "__call__": print})()
uncalled = type("Uncalled", (), {**attributes, "margin": print})()
not_a_loss = 3


class Hinge:
    """A function of the margin with a width of its own."""

    def __init__(self, margin):
        self.margin = margin

    def __call__(self, margin):
        return functional.relu(self.margin - margin)


hinge = Hinge(margin=2.0)


class Mirrored(Algorithm):
    """The human response against the same tokens read backwards: nobody answers, no engine starts for training."""

    reads = ("self_filter",)

    def make_pairs(self, turn):
        played = PlayedPrompts(turn)

        def tables():
            for table in played.tables():
                backwards = [ids[::-1] for ids in table["real_ids"].to_pylist()]
                yield pair_table(table, turn.iteration, pa.chunked_array([pa.array(backwards, TOKEN_IDS)]))

        pairs.make(turn.run, turn.config, turn.iteration, pairs.Fresh(tables(), played.inputs, played.settings))

    def objective(self, config, iteration):
        return margin_objective(config, iteration)


class Momentum(torch.optim.Optimizer):
    """Heavy ball with a counter that is a Python int."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["velocity"], state["count"] = torch.zeros_like(p), 0
                state["count"] += 1
                state["velocity"].mul_(0.9).add_(p.grad)
                p.sub_(state["velocity"], alpha=group["lr"] / state["count"])


class Counting(Fsdp2Backend):
    """FSDP2 that counts its steps."""

    steps = 0

    def step(self):
        Counting.steps += 1
        return super().step()


class SavesPartly(Fsdp2Backend):
    def save_to(self, extra, directory):
        super().save(directory)

    save = partialmethod(save_to, None)


class ReturnsNothing(Fsdp2Backend):
    def step(self):
        super().step()
'''
TRAINS = OptimizerConfig(schedule="constant", warmup_fraction=0)
MOMENTUM = TRAINS.model_copy(update={"name": "my_pkg.mine:Momentum"})


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg/__init__.py").touch()
    (tmp_path / "my_pkg/mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: sys.modules["my_pkg.mine"]
    for name in ("my_pkg", "my_pkg.mine"):
        sys.modules.pop(name, None)


# By name or path


def test_a_function_of_the_margin_becomes_a_margin_loss() -> None:
    """ℓ(m) = max(0, 1 − m)²: m = 0.5 · ((−1 + 2) − (−3 + 3)) = 0.5 gives 0.25."""
    loss = resolve_loss("my_pkg.mine:squared_hinge")
    assert isinstance(loss, MarginLoss)
    policy, reference = (PairValues(torch.tensor([y]), torch.tensor([-3.0])) for y in (-1.0, -2.0))
    assert loss(policy, reference, None, 0.5).item() == 0.25


def test_a_loss_object_is_taken_as_it_is(mine: Any) -> None:
    assert resolve_loss("my_pkg.mine:reference_free") is mine().reference_free


def test_a_function_of_the_margin_may_have_a_margin_that_is_a_number() -> None:
    loss = resolve_loss("my_pkg.mine:hinge")
    assert isinstance(loss, MarginLoss)
    assert loss.function(torch.tensor([0.5])).tolist() == [1.5]


def test_methods_that_are_no_plain_functions_are_left_to_the_object() -> None:
    check_backend("my_pkg.mine:SavesPartly", None, ())


def test_equal_losses_of_several_iterations_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    monkeypatch.setattr(table, "try_loss", lambda loss, name, beta, **_: tried.append(beta))
    content = small_run.make_inputs(tmp_path).model_dump()
    content |= {"iterations": 4}
    content["objective"] |= {"loss": "my_pkg.mine:squared_hinge", "beta": [0.1, 0.1, 0.2, 0.2]}
    table.try_own_objects(SpinConfig.model_validate(content))
    assert tried == [0.1, 0.2]


def test_names_come_from_the_table() -> None:
    assert [resolve_loss(name) for name in LOSSES] == list(LOSSES.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("square_hinge", "'square_hinge' is unknown; use logistic, hinge, exponential, correlation, space, or an imp"),
        ("my_pkg.yours:loss", "my_pkg.yours:loss cannot be imported .*install the module on every machine"),
        ("my_pkg.mine:loss", "module my_pkg.mine has no loss"),
        ("my_pkg.mine:ReferenceFree", "is a class; name an object of it"),
        ("my_pkg.mine:without_two", r"lacks per, margin, which a Loss has"),
        ("my_pkg.mine:numbered", r"lacks margin, which a Loss has"),
        ("my_pkg.mine:uncalled", r"lacks __call__, which a Loss has"),
        ("my_pkg.mine:not_a_loss", "is neither a Loss nor a function of the margin"),
    ],
)
def test_a_path_that_leads_to_no_loss_is_a_config_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"objective.loss: .*{message}"):
        resolve_loss(name)


def test_an_optimizer_without_weight_decay_refuses_a_recipe_that_has_one() -> None:
    decays = MOMENTUM.model_copy(update={"weight_decay": 0.1})
    with pytest.raises(ConfigError, match=r"weight_decay: my_pkg\.mine:Momentum takes no"):
        make_optimizer([torch.nn.Parameter(torch.zeros(2))], decays, 1e-3)


def test_a_weight_decay_of_0_is_given_to_an_optimizer_whose_own_is_another() -> None:
    adamw = TRAINS.model_copy(update={"name": "torch.optim:AdamW"})
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(2))], adamw, 1e-3)
    assert (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[0]["lr"]) == (0.0, 1e-3)


# In use


def test_training_resumed_with_an_own_optimizer_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    """A tensor and a counter of its state go through a checkpoint."""
    model, rows = save_model(tmp_path / "model", tiny_llama()), random_rows(0, 3)
    settings = BackendSettings(
        kind="my_pkg.mine:Counting", max_length=48, precision="fp32", optimizer=MOMENTUM, learning_rate=0.01,
        total_steps=4,
    )  # fmt: skip
    whole, resumed = (make_backend(model, settings, torch.device("cpu")) for _ in range(2))
    train(whole, rows, 2)
    whole.save(tmp_path / "checkpoint")
    expected = train(whole, rows, 2)
    resumed.load(tmp_path / "checkpoint")
    assert train(resumed, rows, 2) == expected
    assert resumed.steps_done == 4


@pytest.mark.parametrize("loss", ["squared_hinge", "reference_free"])
def test_the_stage_trains_with_a_loss_an_optimizer_and_a_backend_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: Any, loss: str
) -> None:
    small_run.in_this_process(monkeypatch)
    config = with_own_training(small_run.make_inputs(tmp_path))
    run = RunDir(Storage(tmp_path / "run"))
    pairs = [
        {"pair_id": f"p{i}/000/0", "prompt_id": f"p{i}", "iteration": 0, "prompt_ids": [1, i], "real_ids": [5, 2],
         "generated_ids": [6, 2]} for i in range(12)
    ]  # fmt: skip
    write_rows(run.pairs(0), PAIR_SCHEMA, pairs, part_rows=12)
    start = ModelFolder(tmp_path / "model", "digest of θ_0", "sft", 0)
    objective = Objective(loss=f"my_pkg.mine:{loss}", beta=0.1)
    training.run(run, config, 0, start, objective)
    assert mine().Counting.steps == small_run.STEPS
    lines = read_json_lines(run.storage, "iter_000/train_log.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert loss == "reference_free" or lines[-1]["margin"] > lines[0]["margin"]
    assert ("real_logp_drift" in lines[0]) == run.reference(0).is_committed == (loss == "squared_hinge")
    settings = run.model(1).manifest().settings
    assert (settings["loss"], settings["optimizer"]["name"]) == (objective.loss, MOMENTUM.name)


@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_each_real_response_of_a_prompt_has_its_own_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """Also of equal lengths, of which the second was scored and trained as the first."""
    small_run.in_this_process(monkeypatch)
    config = small_run.make_inputs(tmp_path)
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention": attention})})
    start = ModelFolder(tmp_path / "model", "digest of θ_0", "sft", 0)
    weights = tmp_path / "model/model.safetensors"  # larger: each response then has another log p
    save_file({name: 10 * weight for name, weight in load_file(weights).items()}, weights, metadata={"format": "pt"})
    run = RunDir(Storage(tmp_path / "run"))
    pairs = [
        {"pair_id": f"p{i}/000/{sample}", "prompt_id": f"p{i}", "iteration": 0, "prompt_ids": [1, 30 + i],
         "real_ids": [[5, 2], [9, 2], [9, 8, 2]][sample], "generated_ids": [6, 2]} for i in range(4)
        for sample in range(3)
    ]  # fmt: skip
    write_rows(run.pairs(0), PAIR_SCHEMA, pairs, part_rows=5)
    training.run(run, config, 0, start, Objective(loss="logistic", beta=0.1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = {row["pair_id"]: row["real_logp"] for row in rows_of(run.reference(0))}
    for row in pairs:
        alone = logp_alone(model, row["prompt_ids"], row["real_ids"]).item()
        assert found[row["pair_id"]] == pytest.approx(alone, abs=1e-3)


def test_a_step_that_returns_nothing_is_told_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run.in_this_process(monkeypatch)
    config = small_run.make_inputs(tmp_path).with_train(backend="my_pkg.mine:ReturnsNothing")
    with pytest.raises(
        ConfigError, match=r"train\.backend: ReturnsNothing\.step\(\) returns a NoneType; expected a .*Step"
    ):
        small_run.run(config, tmp_path / "run")


def test_a_whole_run_with_everything_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: Any) -> None:
    """The recipe names all four; the run goes from rows to a published iterate, and once more from the middle."""
    small_run.in_this_process(monkeypatch)
    content = with_own_training(small_run.make_inputs(tmp_path)).model_dump(mode="json")
    content |= {"algorithm": "my_pkg.mine:Mirrored", "self_filter": {"min_agreement": 0.5}}
    content["objective"]["loss"] = "my_pkg.mine:squared_hinge"
    config = SpinConfig.model_validate(content)
    check_algorithm(config)
    imported: list[tuple[str, str]] = []
    monkeypatch.setattr(driver, "check_imports", lambda paths, _: imported.extend(paths))
    small_run.run(config, tmp_path / "run")
    assert {path for _, path in imported} == {
        f"my_pkg.mine:{name}" for name in ("squared_hinge", "Counting", "Momentum")
    }
    run = RunDir(Storage(tmp_path / "run"))
    assert run.latest() == "iter_000"
    (row, *_) = rows_of(run.pairs(0))
    assert row["generated_ids"] == row["real_ids"][::-1]
    assert not run.generations(0).is_committed
    assert mine().Counting.steps == small_run.STEPS
    assert run.model(1).manifest().settings["loss"] == "my_pkg.mine:squared_hinge"


def with_own_training(config: SpinConfig) -> SpinConfig:
    own = {"optimizer": MOMENTUM, "backend": "my_pkg.mine:Counting"}
    return config.with_train(**own)
