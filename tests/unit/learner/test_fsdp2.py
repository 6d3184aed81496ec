"""The FSDP2 backend in this process (gloo, world size 1) against plain torch, itself resumed, and its own export."""

import gc
import json
import os
import re
import socket
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

from spin_ray.config import compilers
from spin_ray.config.sections import OptimizerConfig
from spin_ray.errors import ModelError
from spin_ray.learner import head, hf_folder
from spin_ray.learner.attention import hook
from spin_ray.learner.backends import modules
from spin_ray.learner.backends.base import BackendSettings, TrainBackend
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.decoder import decoder_layers
from spin_ray.learner.losses import margins, pair_logps, response_logps, sft_loss, spin_loss
from spin_ray.learner.scoring import ResponseScorer
from tests.support.fakes import config_of
from tests.support.learner_cases import batches_of, logp_alone, one_rank, one_step, random_rows, save_model, tiny_llama

torch.set_num_threads(1)
ROWS = random_rows(0, trees=6)
PEAK, STEPS, BETA = 0.01, 8, 0.5

MakeBackend = Callable[..., Fsdp2Backend]


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tiny_llama())


@pytest.fixture
def make(model_dir: Path) -> MakeBackend:
    def make_backend(*, source: Path = model_dir, optimizer: str | None = "rmsprop", **settings: Any) -> Fsdp2Backend:
        chosen = None if optimizer is None else OptimizerConfig(name=optimizer, weight_decay=0.01, max_grad_norm=0.7)
        common: dict[str, Any] = {"max_length": 48, "precision": "fp32", "learning_rate": PEAK, "total_steps": STEPS}
        return Fsdp2Backend(source, BackendSettings(optimizer=chosen, **(common | settings)), torch.device("cpu"))

    return make_backend


def loss_of(logps: Any, batch: Any) -> torch.Tensor:
    """Margins against a reference of 0, and some −log p(y)."""
    real, generated = pair_logps(logps, batch)
    step, zero = one_step(ROWS), torch.zeros_like(real)
    return (
        spin_loss(margins(real, generated, zero, zero, BETA)) / step.num_pairs
        + 0.3 * sft_loss(real) / step.num_real_tokens
    )


def train(backend: TrainBackend, steps: int) -> None:
    batches = batches_of(ROWS)
    for _ in range(steps):
        for i, batch in enumerate(batches):
            backend.backward(loss_of(backend.logps(batch), batch), last_microbatch=i == len(batches) - 1)
        backend.step()


def scores(backend: TrainBackend) -> list[torch.Tensor]:
    return [backend.score(batch) for batch in batches_of(ROWS)]


def assert_same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) > 1
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_margins_are_exactly_0_at_step_0(make: MakeBackend, precision: str, attention: str) -> None:
    backend = make(precision=precision, attention=attention)
    assert backend._scorer.layout == attention
    for batch in batches_of(ROWS):
        reference = pair_logps(backend.score(batch), batch)
        margin = margins(*pair_logps(backend.logps(batch), batch), *reference, beta=5.0)
        assert margin.requires_grad
        assert not margin.any()


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(make: MakeBackend) -> None:
    """RMSprop's first step is 10 times the learning rate, here 10 · 1e-7/2 per weight: bf16 weights would not move."""
    backend = make(precision="bf16", learning_rate=1e-7)
    exact = make(precision="fp32")
    assert not torch.equal(scores(backend)[0], scores(exact)[0])
    torch.testing.assert_close(scores(backend)[0], scores(exact)[0], rtol=0.05, atol=0.5)
    before = [shard.full_tensor().clone() for shard in backend._shards.values()]
    train(backend, 1)
    after = [shard.full_tensor() for shard in backend._shards.values()]
    assert all(weight.dtype == torch.float32 for weight in after)
    assert all((new != old).any() for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_tokens_are_scored_in_the_order_of_their_response_and_sum_to_its_score(
    make: MakeBackend, model_dir: Path, attention: str
) -> None:
    """Beside transformers, which sees each response alone."""
    backend = make(optimizer=None, attention=attention, precision="fp32")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    rows = random_rows(5, trees=3)
    for batch in batches_of(rows):
        tokens = backend.score_tokens(batch)
        assert torch.equal(response_logps(tokens, batch.segment, batch.num_segments), backend.score(batch))
        for row, segment in zip(batch.pair_row.tolist(), batch.generated_segment, strict=True):
            prompt, _, generated = rows[row]
            with torch.no_grad():
                logps = model(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logps.gather(1, torch.tensor(generated)[:, None]).squeeze(1)
            torch.testing.assert_close(tokens[batch.segment == segment], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_training_equals_a_plain_torch_loop(make: MakeBackend, model_dir: Path, name: str) -> None:
    """Three steps of several packs each: FSDP2, accumulation, clipping and schedule change nothing of plain torch.

    lr: 8 steps, 1 of warm-up: peak·(1/2, 1, 6/7).
    """
    backend = make(optimizer=name)
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    scorer, parameters = ResponseScorer(plain), list(plain.parameters())
    optimizer_class = {"rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW}[name]
    optimizer = optimizer_class(parameters, weight_decay=0.01)
    for factor in (1 / 2, 1, 6 / 7):
        for batch in batches_of(ROWS):
            loss_of(scorer(batch), batch).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.7)
        optimizer.param_groups[0]["lr"] = PEAK * factor
        optimizer.step()
        optimizer.zero_grad()
        batches = batches_of(ROWS)
        for i, batch in enumerate(batches):
            backend.backward(loss_of(backend.logps(batch), batch), last_microbatch=i == len(batches) - 1)
        stats = backend.step()
        assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert stats.grad_norm > 0.7, "clipping is not exercised"
        assert stats.learning_rate == pytest.approx(PEAK * factor)
    for name_, weight in plain.named_parameters():
        torch.testing.assert_close(backend._shards[name_].full_tensor(), weight, rtol=1e-4, atol=1e-5)


def test_recomputing_activations_changes_no_bit(make: MakeBackend) -> None:
    found = []
    for gradient_checkpointing in (False, True):
        backend = make(gradient_checkpointing=gradient_checkpointing)
        train(backend, 2)
        found.append(scores(backend))
    assert_same_bits(*found)


def test_one_rank_casts_its_weights_once_a_step(make: MakeBackend) -> None:
    backend, batch = make(), batches_of(ROWS)[0]
    layers = [module._get_fsdp_state()._fsdp_param_group for module in decoder_layers(backend._model)]
    for last in (False, True):
        backend.backward(backend.logps(batch).sum(), last_microbatch=last)
        assert {layer.is_unsharded for layer in layers} == {not last}


def test_a_scorer_in_bf16_gives_the_bits_of_training_with_half_the_memory(make: MakeBackend) -> None:
    trains, only_scores = make(precision="bf16"), make(precision="bf16", optimizer=None)
    assert {shard.dtype for shard in only_scores._shards.values()} == {torch.bfloat16}
    assert {shard.dtype for shard in trains._shards.values()} == {torch.float32}
    assert_same_bits(scores(only_scores), scores(trains))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_scorer_that_keeps_its_weights_on_the_host_gives_the_same_bits(make: MakeBackend, precision: str) -> None:
    recipe = config_of(train={"precision": precision, "offload": True})
    settings = BackendSettings.for_scoring(recipe)
    assert settings.offload and settings.optimizer is None, "what a card cannot hold for training, it cannot for this"
    scorer = make(precision=precision, optimizer=None, offload=True)
    assert_same_bits(scores(scorer), scores(make(precision=precision, optimizer=None)))


@pytest.mark.parametrize("optimizer", [None, "adamw"])
def test_a_closed_backend_leaves_no_parameter_behind(make: MakeBackend, optimizer: str | None) -> None:
    """Without the collector's help: it is switched off but for the call in ``close``."""
    gc.collect()
    gc.disable()
    try:
        backend = make(optimizer=optimizer)
        if optimizer:
            train(backend, 1)
        scores(backend)
        kept = [weakref.ref(tensor) for tensor in backend._shards.values()]
        backend.close()
        assert not [reference for reference in kept if reference() is not None]
    finally:
        gc.enable()


def test_the_deterministic_switch_forbids_kernels_of_no_fixed_order(
    make: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch._inductor.config, "deterministic", False)
    expected = scores(make())
    try:
        backend = make(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch._inductor.config.deterministic
        assert_same_bits(scores(backend), expected)
        train(backend, 1)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts compiled graphs; aot_eager traces forward and backward as for GPUs, but starts no C++ compiler."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(head, "COMPILER", counter)
    head._compiled.cache_clear()
    monkeypatch.setattr(hook.AttentionInterface, "_global_mapping", dict(hook.AttentionInterface._global_mapping))
    torch._dynamo.reset()
    yield counter
    head._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_layers_train_like_eager_ones_and_start_at_margin_0(
    make: MakeBackend, graphs: CompileCounterWithBackend
) -> None:
    """Packs of several lengths and numbers of trees share the graphs, and so do layers, scoring and training."""
    batches = [batch for length in (48, 64, 96) for batch in batches_of(ROWS, pack_length=length)]
    found = []
    for compiled in (False, True):
        backend = make(compile=compiled, gradient_checkpointing=compiled)
        for batch in batches:
            score, logps = backend.score(batch), backend.logps(batch)
            assert torch.equal(score, logps) and not score.requires_grad
            backend.backward(logps.sum(), last_microbatch=batch is batches[-1])
        found.append([logps, *(shard.grad.to_local() for shard in backend._shards.values())])
        assert (graphs.frame_count > 0) == compiled
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4)
    assert graphs.frame_count <= 8


def test_layers_are_compiled_on_gpus_that_have_the_tools_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    card, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(modules, "find_spec", lambda name: name)
    monkeypatch.setattr(compilers.shutil, "which", lambda name: name if name == "gcc" else None)
    assert [modules.compiles(wanted, card) for wanted in ("auto", True, False)] == [True, True, False]
    with pytest.raises(ModelError, match=r"^train\.compile: needs a C\+\+ compiler"):
        modules.compiles(True, cpu)
    monkeypatch.setattr(compilers.shutil, "which", lambda name: name if name == "g++" else None)
    assert [modules.compiles(wanted, cpu) for wanted in ("auto", True, False)] == [False, True, False]
    assert not modules.compiles("auto", card)
    with pytest.raises(
        ModelError, match=r"^train\.compile: needs a C compiler .*; install it or set train\.compile: f"
    ):
        modules.compiles(True, card)


def test_without_pythons_headers_layers_stay_uncompiled_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton compiles against them at the first launch; a distribution's Python has them in a package of their own."""
    monkeypatch.setattr(modules, "find_spec", lambda name: name)
    monkeypatch.setattr(compilers.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert not modules.compiles("auto", torch.device("cuda"))
    assert f"train.compile: {socket.gethostname()} needs /" in caplog.text
    assert re.search(r"needs \S+/Python\.h \(apt-get install python3\.\d+-dev, or take a Python that", caplog.text)
    with pytest.raises(ModelError, match=r"^train\.compile: needs \S+/Python\.h"):
        modules.compiles(True, torch.device("cuda"))


def test_layers_that_are_split_stay_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13's compiler ends in a RecursionError on them."""
    monkeypatch.setattr(modules, "find_spec", lambda name: name)
    card = torch.device("cuda")
    assert not modules.compiles("auto", card, split=True)
    with pytest.raises(ModelError, match=r"^train\.compile: layers that are split .* cannot be compiled; leave it out"):
        modules.compiles(True, card, split=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_resumed_training_is_bitwise_the_uninterrupted_one(
    make: MakeBackend, tmp_path: Path, name: str, steps_before: int
) -> None:
    uninterrupted = make(optimizer=name, precision="bf16")
    train(uninterrupted, steps_before)
    uninterrupted.save(tmp_path)
    train(uninterrupted, 2)

    resumed = make(optimizer=name, precision="bf16")
    train(resumed, 1)  # whatever it was before is replaced
    resumed.load(tmp_path)
    assert resumed.steps_done == steps_before
    train(resumed, 2)
    assert resumed.steps_done == uninterrupted.steps_done == steps_before + 2
    assert_same_bits(scores(resumed), scores(uninterrupted))
    for one, other in zip(resumed._shards.values(), uninterrupted._shards.values(), strict=True):
        assert torch.equal(one.full_tensor(), other.full_tensor())


def test_scoring_sees_the_weights_that_load_and_step_put_in_place(make: MakeBackend, tmp_path: Path) -> None:
    """FSDP2 keeps gathered weights after a forward without backward; they must not survive a load or a step."""
    backend = make()
    first = scores(backend)
    backend.save(tmp_path)
    batches = batches_of(ROWS)
    for i, batch in enumerate(batches):
        backend.backward(loss_of(backend.logps(batch), batch), last_microbatch=i == len(batches) - 1)
    scores(backend)  # between backward and step
    backend.step()
    assert not torch.equal(scores(backend)[0], first[0])
    backend.load(tmp_path)
    assert_same_bits(scores(backend), first)


def test_ranks_that_write_nothing_wait_for_each_gather_of_an_export(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """NCCL counts a collective's time from the call, and rank 0 writes between two of them."""
    done: list[str] = []
    monkeypatch.setattr(modules.dist, "get_rank", lambda: 1)
    stream = SimpleNamespace(synchronize=lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    def gather(tensor: Any) -> Any:
        done.append(tensor.name)
        return tensor

    devices = {"a": "cuda", "b": "cuda", "c": "cpu"}
    tensors: Any = [
        (name, SimpleNamespace(name=name, is_cuda=device == "cuda", device=device)) for name, device in devices.items()
    ]
    modules.export(tmp_path, None, tensors, gather, tmp_path, BackendSettings(max_length=8))
    assert done == ["a", "wait", "b", "wait", "c"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_export_loads_in_transformers_and_scores_the_same_bits(
    make: MakeBackend, tmp_path: Path, precision: str, tied: bool
) -> None:
    backend = make(source=save_model(tmp_path / "start", tiny_llama(tied=tied)), precision=precision)
    train(backend, 1)
    backend.export_hf(tmp_path / "out")

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # dtype as the config says
    assert loaded.dtype == dtype
    with torch.no_grad():
        expected = [ResponseScorer(loaded)(batch) for batch in batches_of(ROWS)]
    assert_same_bits(scores(backend), expected)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_export_brings_the_tokenizer_and_template_and_leaves_run_files_behind(
    make: MakeBackend, tmp_path: Path
) -> None:
    start = save_model(tmp_path / "start", tiny_llama())
    # transformers loads such a generation config but refuses to save it.
    generation = {"temperature": 0.6, "do_sample": False, "eos_token_id": [2, 7]}
    files = {
        "generation_config.json": json.dumps(generation),
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "chat_template.jinja": "{{ messages }}",
        "vocab.txt": "a\nb",
        "LICENSE": "free",
        "LICENCE-2.0.md": "as in Britain",
        "notice.txt": "small",
        "USE_POLICY.md": "for good alone",
    }
    left_behind = {"_MANIFEST.json": "{}", "README.md": "# Start", "training_args.bin": "pickle", "code.py": "evil()"}
    left_behind |= {f"{of}_results.json": '{"loss": 1}' for of in ("all", "train", "eval")} | {"LICENSE.py": "evil()"}
    for name, text in (files | left_behind).items():
        (start / name).write_text(text)
    make(source=start, optimizer=None).export_hf(tmp_path / "out")
    exported = {file.name for file in (tmp_path / "out").iterdir()}
    assert exported == set(files) | {"config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == text for name, text in files.items())


def test_a_gradient_that_is_not_finite_raises_before_any_weight_moves(make: MakeBackend) -> None:
    backend = make()
    before = scores(backend)
    (batch, *_) = batches_of(ROWS)
    backend.backward(loss_of(backend.logps(batch), batch) * torch.inf, last_microbatch=True)
    with pytest.raises(FloatingPointError, match="optimizer step 0"):
        backend.step()
    assert_same_bits(scores(backend), before)
    assert backend.steps_done == 0


def test_a_backend_without_optimizer_scores_and_refuses_to_train(make: MakeBackend, tmp_path: Path) -> None:
    backend = make(optimizer=None)
    batch = batches_of(ROWS)[0]
    prompt, real, _ = ROWS[int(batch.pair_row[0])]
    expected = logp_alone(tiny_llama(), prompt, real)
    torch.testing.assert_close(backend.score(batch)[batch.real_segment[0]], expected, rtol=0, atol=1e-4)
    for refused in (backend.step, lambda: backend.save(tmp_path), lambda: backend.load(tmp_path)):
        with pytest.raises(RuntimeError, match="scoring only"):
            refused()


def test_a_large_model_is_written_file_by_file_and_reads_as_the_same(
    make: MakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings have 61 x 32 fp32 numbers, 7,808 bytes; a file holds 8,000 of weights that are smaller."""
    backend = make()
    backend.export_hf(tmp_path / "one")
    monkeypatch.setattr(hf_folder, "FILE_BYTES", 8000)
    backend.export_hf(tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert max(file.stat().st_size for file in files) < 9000
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]
    one, many = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters()) for name in ("one", "many")
    )
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    others = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.json")}
    assert others == {name: (tmp_path / "many" / name).read_bytes() for name in others}
