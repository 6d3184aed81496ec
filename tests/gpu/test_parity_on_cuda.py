"""On a card: attention, head, scores, a step, resume and export agree with transformers and with the CPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_ray.config.sections import LoraConfig, OptimizerConfig
from spin_ray.learner.attention import ATTENTIONS
from spin_ray.learner.attention.rule import visible
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.head import LogitTransform, target_logps
from tests.support.learner_cases import batches_of, logp_alone, random_rows, save_model, tiny_llama, train

ROWS = random_rows(seed=0, trees=4)
HEADS, KV_HEADS, WIDTH = 4, 2, 64


def backend(folder, device, precision="fp32", **more):
    settings = BackendSettings(
        max_length=48, precision=precision, learning_rate=1e-3, total_steps=100,
        optimizer=OptimizerConfig(schedule="constant", warmup_fraction=0), **more,
    )  # fmt: skip
    return Fsdp2Backend(folder, settings, device)


@pytest.fixture
def model(tmp_path):
    """Saves a model with heads of 16, the narrowest that FlexAttention's kernels take."""
    return save_model(tmp_path / "model", tiny_llama(hidden=64))


@pytest.mark.parametrize(("name", "softcap"), [("flex", None), ("flex", 2.0), ("varlen", None)])
def test_attention_and_its_gradients_are_those_of_the_rule_in_fp64(card, name, softcap):
    batch = batches_of(ROWS, pack_length=256)[0]
    useful = batch.num_useful_tokens
    torch.manual_seed(0)
    states = [torch.randn(1, heads, len(batch.tree), WIDTH, device=card) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    upstream = torch.randn(1, len(batch.tree), HEADS, WIDTH, device=card)
    upstream[:, useful:] = 0
    found = [x.bfloat16().requires_grad_() for x in states]
    exact = [x.detach().double().requires_grad_() for x in found]
    plan = ATTENTIONS[name].prepare(batch, [None], card, torch.bfloat16)
    settings = {"scaling": WIDTH**-0.5, "window": None, "softcap": softcap, "sinks": None}
    output = plan.attend(*found, **settings)
    output.backward(upstream.bfloat16())
    query, keys, values = exact
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
    scores = query @ keys.transpose(-1, -2) * WIDTH**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    truth = (scores.masked_fill(~visible(batch).to(card), -torch.inf).softmax(-1) @ values).transpose(1, 2)
    truth.backward(upstream.double())
    for mine, wanted in [
        (output[:, :useful], truth[:, :useful]),
        *((a.grad, b.grad) for a, b in zip(found, exact, strict=True)),
    ]:
        assert (mine.double() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("fused", [False, True])
def test_the_head_and_its_gradients_are_those_of_log_softmax(card, fused):
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 101, bias=False, device=card)
    hidden = torch.randn(80, 32, device=card, requires_grad=True)
    at, targets = torch.arange(70, device=card), torch.arange(70, device=card)
    weight = torch.randn(70, device=card)
    found = target_logps(head, hidden, at, targets, LogitTransform(), fused=fused)
    expected = head(hidden[at]).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    inputs = (hidden, head.weight)
    for mine, wanted in zip(
        torch.autograd.grad(found @ weight, inputs), torch.autograd.grad(expected @ weight, inputs), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


def test_scores_are_transformers_own_one_response_at_a_time(alone, model):
    alone_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = [logp_alone(alone_model, prompt, response) for prompt, *both in ROWS for response in both]
    learner, found = backend(model, alone), {}
    assert (learner._scorer.layout, learner._scorer._attention.name) == ("packed", "flex")
    for batch in batches_of(ROWS):
        logps = learner.score(batch.to(alone)).cpu()
        for row, real, generated in zip(
            batch.pair_row.tolist(), batch.real_segment.tolist(), batch.generated_segment.tolist(), strict=True
        ):
            found[row] = (logps[real], logps[generated])
    mine = [logp for row in sorted(found) for logp in found[row]]
    torch.testing.assert_close(torch.stack(mine), torch.stack(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_scores_and_the_first_step_have_the_same_bits(alone, model, compiled):
    learner = backend(model, alone, "bf16", compile=compiled, gradient_checkpointing=compiled)
    for batch in batches_of(ROWS):
        torch.testing.assert_close(learner.score(batch), learner.logps(batch).detach(), rtol=0, atol=0)


def test_steps_in_fp32_are_those_of_a_cpu(alone, model):
    on_card = train(backend(model, alone), ROWS, steps=3)
    on_cpu = train(backend(model, torch.device("cpu")), ROWS, steps=3)
    assert on_card == pytest.approx(on_cpu, rel=1e-3)


def test_a_loaded_checkpoint_goes_on(alone, model, tmp_path):
    learner = backend(model, alone, "bf16")
    train(learner, ROWS, steps=2)
    learner.save(tmp_path / "checkpoint")
    again = backend(model, alone, "bf16")
    again.load(tmp_path / "checkpoint")
    assert train(again, ROWS, steps=1) == [pytest.approx(train(learner, ROWS, steps=1)[0], rel=1e-3)]


def test_an_exported_model_says_what_was_trained(alone, model, tmp_path):
    learner = backend(model, alone)
    train(learner, ROWS, steps=2)
    (tmp_path / "out").mkdir()
    learner.export_hf(tmp_path / "out")
    batch = batches_of(ROWS)[0]
    exported = backend(tmp_path / "out", alone)
    torch.testing.assert_close(exported.score(batch), learner.score(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_adapters_train_on_frozen_integers_and_step_0_has_the_scores_bits(alone, model, base):
    pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")
    learner = backend(model, alone, "bf16", base=base, lora=LoraConfig(rank=4, base=base, merge=False))
    frozen = [weight for weight in learner._model.parameters() if not weight.is_floating_point()]
    before = [weight.clone() for weight in frozen]
    for batch in batches_of(ROWS):
        torch.testing.assert_close(learner.score(batch), learner.logps(batch).detach(), rtol=0, atol=0)
    losses = [loss for loss, _ in train(learner, ROWS, steps=3)]
    assert losses[-1] < losses[0]
    assert frozen and all(torch.equal(weight, kept) for weight, kept in zip(frozen, before, strict=True))
