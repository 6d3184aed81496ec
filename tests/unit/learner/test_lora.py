"""LoRA on the FSDP2 backend against PEFT in a plain loop; with two ranks and with DeepSpeed: test_deepspeed.py."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from spin_ray.config.sections import LoraConfig, OptimizerConfig
from spin_ray.errors import ModelError
from spin_ray.learner.adapters import refuse_unadaptable
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.backends.modules import decoder_layers
from spin_ray.learner.losses import margins, pair_logps, spin_loss
from spin_ray.learner.scoring import ResponseScorer
from tests.support.learner_cases import batches_of, one_rank, one_step, random_rows, save_model, tiny_llama, train
from tests.support.model_kinds import KINDS

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")
torch.set_num_threads(1)
ROWS = random_rows(0, trees=6)
LORA = LoraConfig(rank=4, alpha=6)
MakeBackend = Callable[..., Fsdp2Backend]


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tiny_llama())


def backend_of(model_dir: Path, lora: LoraConfig | None = LORA, **changes: Any) -> Fsdp2Backend:
    optimizer = OptimizerConfig(name="adamw", schedule="constant", warmup_fraction=0, max_grad_norm=1e9)
    common: dict[str, Any] = {"max_length": 48, "precision": "fp32", "learning_rate": 0.01, "total_steps": 8}
    settings = BackendSettings(lora=lora, **(common | {"optimizer": optimizer} | changes))
    return Fsdp2Backend(model_dir, settings, torch.device("cpu"))


@pytest.fixture
def make(model_dir: Path) -> MakeBackend:
    return partial(backend_of, model_dir)


def train_with_peft(
    backend: Fsdp2Backend, model_dir: Path, steps: int
) -> tuple[list[list[float]], Any, dict[str, Any]]:
    """A plain torch loop over PEFT's model from the first A of ``backend``: (losses and norms, model, adapters)."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear")
    plain = peft.get_peft_model(model, config).eval()
    adapters = {
        name.removeprefix("base_model.model."): weight
        for name, weight in plain.named_parameters()
        if weight.requires_grad
    }
    with torch.no_grad():
        for name, weight in adapters.items():
            weight.copy_(backend._shards[name].full_tensor())
    scorer, optimizer = ResponseScorer(model), torch.optim.AdamW(adapters.values(), lr=0.01, weight_decay=0)
    history = []
    for _ in range(steps):
        total = 0.0
        for batch in batches_of(ROWS):
            real, generated = pair_logps(scorer(batch), batch)
            zero = torch.zeros_like(real)
            loss = spin_loss(margins(real, generated, zero, zero, 0.5)) / one_step(ROWS).num_pairs
            loss.backward()
            total += loss.item()
        history.append([total, torch.nn.utils.get_total_norm([weight.grad for weight in adapters.values()]).item()])
        optimizer.step()
        optimizer.zero_grad()
    return history, plain, adapters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_at_step_0_the_model_is_the_opponent_to_the_last_bit(make: MakeBackend, precision: str) -> None:
    """B is 0, so nothing is added; the reference may be scored by the opponent itself, without adapters."""
    adapted, opponent = make(precision=precision), make(None, precision=precision)
    for batch in batches_of(ROWS):
        reference = pair_logps(opponent.score(batch), batch)
        margin = margins(*pair_logps(adapted.logps(batch), batch), *reference, beta=5.0)
        assert margin.requires_grad
        assert not margin.any()


def test_training_equals_peft_in_a_plain_loop(make: MakeBackend, model_dir: Path, tmp_path: Path) -> None:
    """Three steps from the same first A; then PEFT's own merge equals the export."""
    backend = make(seed=3)
    expected, plain, adapters = train_with_peft(backend, model_dir, 3)
    assert {name for name, shard in backend._shards.items() if shard.requires_grad} == set(adapters)
    assert train(backend, ROWS, 3) == [pytest.approx(step, rel=1e-4) for step in expected]
    for name, weight in adapters.items():
        torch.testing.assert_close(backend._shards[name].full_tensor(), weight, rtol=1e-3, atol=1e-5)

    backend.export_hf(tmp_path / "out")
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    merged = dict(plain.merge_and_unload().named_parameters())
    start = dict(AutoModelForCausalLM.from_pretrained(model_dir).named_parameters())
    assert exported.keys() == merged.keys() == start.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(exported[name], weight, rtol=1e-3, atol=1e-5)
        assert torch.equal(exported[name], start[name]) != name.endswith("_proj.weight")


def test_an_exported_iterate_is_a_plain_model_that_scores_as_the_adapted_one(make: MakeBackend, tmp_path: Path) -> None:
    backend = make()
    train(backend, ROWS, 2)
    backend.export_hf(tmp_path / "out")
    loaded = ResponseScorer(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    with torch.no_grad():
        for batch in batches_of(ROWS):
            torch.testing.assert_close(backend.score(batch), loaded(batch), rtol=1e-5, atol=1e-4)


def test_layers_that_store_their_weights_transposed_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    """GPT-2's Conv1D, square and not: the export is PEFT's merge of the adapter that the same training commits."""
    start = save_model(tmp_path / "start", KINDS["GPT-2"].make())
    for name in ("whole", "adapter"):
        backend = backend_of(start, LoraConfig(rank=4, alpha=6, merge=name == "whole"))
        train(backend, ROWS, 1)
        backend.export_hf(tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(start)
    plain = {name: weight.clone() for name, weight in base.named_parameters()}
    merged = dict(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().named_parameters())
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "whole").named_parameters())
    assert exported.keys() == merged.keys() == plain.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(exported[name], weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(weight, plain[name]) != name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def test_a_checkpoint_holds_the_adapters_only_and_resumes_bit_for_bit(make: MakeBackend, tmp_path: Path) -> None:
    backend = make()
    train(backend, ROWS, 2)
    backend.save(tmp_path / "adapters")
    stored = FileSystemReader(tmp_path / "adapters").read_metadata().state_dict_metadata
    assert {name for name in stored if "lora_" not in name} == {"steps_done"}
    resumed = make(seed=9)
    resumed.load(tmp_path / "adapters")
    assert train(resumed, ROWS, 2) == train(backend, ROWS, 2)
    for batch in batches_of(ROWS):
        assert torch.equal(resumed.score(batch), backend.score(batch))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_next_iteration_begins_with_the_bits_of_the_committed_adapter(
    make: MakeBackend, precision: str, tmp_path: Path
) -> None:
    """To train and to score alike; in bf16 the frozen weights are read in shares, and the adapter is filled in last."""
    alone = LoraConfig(rank=4, alpha=6, merge=False)
    backend = make(alone, precision=precision)
    train(backend, ROWS, 2)
    backend.export_hf(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    trains, scores = (
        make(alone, precision=precision, adapter=tmp_path),
        make(None, precision=precision, adapter=tmp_path, optimizer=None),
    )
    for batch in batches_of(ROWS):
        assert torch.equal(trains.score(batch), backend.score(batch))
        assert torch.equal(scores.score(batch), backend.score(batch))
    with pytest.raises(ModelError, match=r"has shape .*set train\.lora\.rank"):
        make(LoraConfig(rank=2, merge=False), adapter=tmp_path)


def test_muon_moves_adapters_as_torch_does(make: MakeBackend) -> None:
    backend = make(optimizer=OptimizerConfig(name="muon", schedule="constant", warmup_fraction=0, max_grad_norm=1e9))
    shards = {name: shard for name, shard in backend._shards.items() if shard.requires_grad}
    plain = {name: torch.nn.Parameter(shard.full_tensor().detach().clone()) for name, shard in shards.items()}
    theirs = torch.optim.Muon(plain.values(), lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(2):
        for batch in batches_of(ROWS):
            backend.backward(backend.logps(batch).sum(), last_microbatch=True)
        for name, weight in plain.items():
            weight.grad = shards[name].grad.full_tensor().clone()
        backend.step()
        theirs.step()
    for name, weight in plain.items():
        torch.testing.assert_close(shards[name].full_tensor(), weight, rtol=1e-5, atol=1e-6)


def test_a_full_rank_adapter_takes_the_step_that_the_weight_would(make: MakeBackend) -> None:
    """dL/dB = scaling · dL/dW Aᵀ at B = 0: with A = 1 (rank = width) and scaling 1 B's gradient is W's own."""
    lora = LoraConfig(rank=32, alpha=32, target_modules=("q_proj",))
    adapted, whole = make(lora), make(None)
    for name, shard in adapted._shards.items():
        if "lora_A" in name:
            shard.data.to_local().copy_(torch.eye(32))
    for backend in (adapted, whole):
        batch = batches_of(ROWS)[0]
        backend.backward(backend.logps(batch).sum(), last_microbatch=True)
    for name, shard in adapted._shards.items():
        if "lora_B" in name:
            expected = whole._shards[name.replace("lora_B.default.", "")].grad
            torch.testing.assert_close(shard.grad.full_tensor(), expected.full_tensor(), rtol=1e-4, atol=1e-4)


def test_the_first_values_follow_from_the_seed_and_touch_no_other_randomness(make: MakeBackend) -> None:
    def first_values(seed: int) -> torch.Tensor:
        shards = make(seed=seed)._shards
        return torch.cat([shard.full_tensor().flatten() for name, shard in shards.items() if "lora_A" in name])

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(first_values(1), first_values(1))
    assert not torch.equal(first_values(1), first_values(2))
    assert torch.equal(torch.rand(3), expected)


def test_one_rank_computes_with_a_copy_of_one_frozen_layer_at_a_time(make: MakeBackend) -> None:
    """A frozen model of 7B fits a card of 24 GB once and not twice. Training all weights keeps the copy."""
    for lora, copied in ((LORA, False), (None, True)):
        backend = make(lora=lora)
        backend.score(batches_of(ROWS)[0])
        layer: Any = decoder_layers(backend._model)[0]
        shards = layer._get_fsdp_state()._fsdp_param_group.fsdp_params
        kept = [output for shard in shards for output in shard.all_gather_outputs]
        assert kept and all((output.untyped_storage().size() > 0) is copied for output in kept)


def test_a_name_that_no_layer_has_is_an_error(make: MakeBackend) -> None:
    with pytest.raises(ModelError, match=r"train\.lora\.target_modules: .*qkv"):
        make(LoraConfig(target_modules=("qkv",)))


@pytest.mark.parametrize(
    ("targets", "has"),
    [
        (("q_proj", "v_porj"), "layer v_porj; it has v_proj, "),
        (("self_attn.q_proj", "mlp.up_prj"), r"layer mlp\.up_prj; it has mlp\.up_proj"),
        (("q_proj", "query"), "layer query; it has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_"),
    ],
)
def test_one_name_among_several_that_no_layer_has_is_an_error(make: MakeBackend, targets: Any, has: str) -> None:
    """PEFT adapts the others and says nothing."""
    with pytest.raises(ModelError, match=r"train\.lora\.target_modules: the model has no linear " + has):
        make(LoraConfig(target_modules=targets))


def test_names_are_checked_before_a_run(model_dir: Path, tmp_path: Path) -> None:
    wrong, head = LoraConfig(target_modules=("q_proj", "v_porj")), LoraConfig(target_modules=("q_proj", "lm_head"))
    untied = save_model(tmp_path, tiny_llama(tied=False))
    for own_code in (False, True):
        refuse_unadaptable(untied, head, trust_remote_code=own_code)
        with pytest.raises(ModelError, match="no linear layer v_porj; it has v_proj"):
            refuse_unadaptable(untied, wrong, trust_remote_code=own_code)
    refuse_unadaptable(model_dir, head.model_copy(update={"merge": False}), trust_remote_code=False)
    with pytest.raises(ModelError, match="lm_head shares its weight with the embedding"):
        refuse_unadaptable(model_dir, head, trust_remote_code=False)


def test_frozen_weights_are_held_once_in_bf16(make: MakeBackend) -> None:
    """2 bytes a frozen parameter, 4 a trained one, and no module keeps a copy beside its parameters."""
    backend = make(precision="bf16")
    held = {name: shard.to_local() for name, shard in backend._shards.items()}
    frozen = [part for name, part in held.items() if "lora_" not in name]
    parameters = sum(part.numel() for part in frozen)
    assert sum(part.untyped_storage().nbytes() for part in frozen) <= 2 * parameters * 1.05
    assert {part.dtype for name, part in held.items() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("merge", [True, False])
def test_experts_held_as_one_tensor_stay_as_they_are_and_the_rest_is_exported(tmp_path: Path, merge: bool) -> None:
    """PEFT's "all-linear" adapts them, too; the export failed on them after the training."""
    start = save_model(tmp_path / "start", KINDS["Qwen3-MoE"].make())
    backend = backend_of(start, LoraConfig(rank=2, merge=merge))
    adapted = {name.split(".")[3] for name in backend._shards if "lora_A" in name}
    assert adapted == {"self_attn"}
    train(backend, ROWS, 1)
    (tmp_path / "out").mkdir()
    backend.export_hf(tmp_path / "out")
    source, more = (tmp_path / "out", {}) if merge else (start, {"adapter": tmp_path / "out"})
    again, batch = backend_of(source, None, optimizer=None, **more), batches_of(ROWS)[0]
    torch.testing.assert_close(again.score(batch), backend.score(batch), rtol=1e-5, atol=1e-4)


def test_layers_that_are_not_linear_are_refused_before_training(tmp_path: Path) -> None:
    start = save_model(tmp_path / "start", KINDS["Qwen3-MoE"].make())
    with pytest.raises(ModelError, match=r"target_modules: .*experts.* is no linear layer but a Qwen3MoeExperts; name"):
        backend_of(start, LoraConfig(rank=2, target_modules=("gate_proj", "up_proj", "down_proj")))
    with pytest.raises(ModelError, match=r"target_modules: model\.embed_tokens is no linear layer but a Embedding"):
        backend_of(start, LoraConfig(rank=2, target_modules=("q_proj", "embed_tokens")))
