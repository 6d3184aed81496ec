"""Packed and padded scores against transformers' own, one sequence at a time."""

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from spin_ray.errors import ModelError
from spin_ray.learner import head, scoring
from spin_ray.learner.attention import trees
from spin_ray.learner.attention.dense import additive_mask
from spin_ray.learner.layout import Choice, choose_layout
from spin_ray.learner.losses import pair_logps
from spin_ray.learner.packing import build_pack
from spin_ray.learner.scoring import ResponseScorer
from tests.support.learner_cases import VOCAB, Row, batches_of, logp_alone, random_rows, table_of, tiny_llama

torch.set_num_threads(1)


def gemma(*, attention: float | None = None, window: int = 512, logits: float = 2.0) -> Gemma2ForCausalLM:
    """Its logits are not head(hidden): 2·tanh(·/2) comes after. Its first layer has a window."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            head_dim=8, num_key_value_heads=2, final_logit_softcapping=logits, attn_logit_softcapping=attention,
            query_pre_attn_scalar=8, initializer_range=0.2, sliding_window=window, attn_implementation="eager",
        )
    ).eval()  # fmt: skip


def granite() -> GraniteForCausalLM:
    torch.manual_seed(0)
    return GraniteForCausalLM(
        GraniteConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, logits_scaling=3.0, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip


def gpt_oss() -> GptOssForCausalLM:
    """It has attention sinks, and a window in its first layer."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=6,
            initializer_range=0.2, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


class OddHead(LlamaForCausalLM):
    """Its logits are transformed in a way that no config names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


def odd_head() -> Any:
    return OddHead(tiny_llama().config).eval()


def mask_ignoring() -> Any:
    """A Llama that attends causally whatever mask it is given."""
    model = tiny_llama()
    decode = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: decode(*args, **kwargs)
    return model


def mask_refusing() -> Any:
    """A Llama that works with 2-D masks only."""
    model = tiny_llama()
    decode = model.model.forward

    def forward(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("mask must be [batch, length]")
        if kwargs["input_ids"].shape[0] > 1 and attention_mask is None:
            raise ValueError("rows of unequal length need a mask")
        return decode(*args, attention_mask=attention_mask, **kwargs)

    model.model.forward = forward
    return model


def windowed() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=8, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


def learned_positions() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


def assert_scores_match(model: Any, layout: scoring.Layout, rows: list[Row]) -> None:
    scorer = ResponseScorer(model, layout)
    for batch in batches_of(rows):
        with torch.no_grad():
            real, generated = pair_logps(scorer(batch), batch)
        for i, row in enumerate(batch.pair_row.tolist()):
            prompt, real_ids, generated_ids = rows[row]
            torch.testing.assert_close(real[i], logp_alone(model, prompt, real_ids), rtol=0, atol=1e-5)
            torch.testing.assert_close(generated[i], logp_alone(model, prompt, generated_ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_those_of_each_sequence_alone(layout: scoring.Layout, seed: int) -> None:
    assert_scores_match(tiny_llama(seed=seed, tied=seed % 2 == 0), layout, random_rows(seed, trees=6, samples=3))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_scores_equal_with_learned_absolute_positions(layout: scoring.Layout) -> None:
    assert_scores_match(learned_positions(), layout, random_rows(7, trees=5))


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_with_and_without_a_graph_are_the_same_bits(layout: scoring.Layout, dtype: torch.dtype) -> None:
    """Margins start at exactly 0 only so."""
    scorer = ResponseScorer(tiny_llama().to(dtype), layout)
    for batch in batches_of(random_rows(1, trees=6)):
        with torch.no_grad():
            reference = scorer(batch)
        logps = scorer(batch)
        assert logps.requires_grad
        assert torch.equal(logps, reference)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_dropout_is_off_even_for_a_model_in_training_mode(layout: scoring.Layout) -> None:
    scorer = ResponseScorer(tiny_llama().train(), layout)  # attention_dropout 0.5
    (batch, *_) = batches_of(random_rows(1, trees=3))
    assert torch.equal(scorer(batch), scorer(batch))


def test_attention_tree_by_tree_is_attention_over_the_whole_pack() -> None:
    """All that lies outside the trees' blocks is masked anyway."""
    model = tiny_llama()
    for batch in batches_of(random_rows(3, trees=6, samples=2)):
        results = []
        for attention in ("trees", "dense"):
            model.zero_grad()
            logps = ResponseScorer(model, "packed", attention)(batch)
            logps.sum().backward()
            results.append([logps.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        for by_tree, whole in zip(*results, strict=True):
            torch.testing.assert_close(by_tree, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kv_heads", "dtype", "exact", "tolerance"),
    [(2, torch.float32, 128, 1e-5), (4, torch.bfloat16, 128, 2e-2), (2, torch.bfloat16, 0, 2e-2)],
)
def test_plain_products_attend_as_sdpa_does(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, dtype: torch.dtype, exact: int, tolerance: float
) -> None:
    """Four query heads on two or four of keys, two trees, forward and backward; the second kernel is SDPA's. ``exact``
    0 makes the products of bf16, as those of longer trees are.
    """
    monkeypatch.setattr(trees, "EXACT_TREES", exact)
    spans, length = ((0, 5), (5, 12)), 12
    seen = torch.block_diag(*(torch.ones(stop - start, stop - start).tril() for start, stop in spans)).bool()
    plan = trees.TreesPlan(spans, {None: additive_mask(seen, dtype)[None, None]})
    found = []
    for limits in (trees.DENSE_TREES, {}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trees, "DENSE_TREES", limits)
            torch.manual_seed(1)
            states = [torch.randn(1, heads, length, 8).to(dtype).requires_grad_() for heads in (4, kv_heads, kv_heads)]
            output = plan.attend(*states, scaling=0.3, window=None, softcap=None, sinks=None)
            (output.float() * torch.arange(8)).sum().backward()
            found.append([output, *(state.grad for state in states)])
    for dense, other in zip(*found, strict=True):
        torch.testing.assert_close(dense, other, rtol=tolerance, atol=10 * tolerance)


def test_spans_of_trees_cover_the_pack_and_its_padding() -> None:
    batch = build_pack(((0,), (1,)), table_of([([5, 6], [7, 2], [8]), ([5], [9], [4])]), pack_length=12, pad_id=0)
    assert trees.tree_spans(batch) == ((0, 5), (5, 8), (8, 12))


def test_chunks_of_the_head_change_neither_scores_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(2, trees=5)
    found = []
    for targets_per_chunk in (3, 256):
        monkeypatch.setitem(head.ROWS_PER_CHUNK, "cpu", targets_per_chunk)
        model = tiny_llama()
        logps = ResponseScorer(model)(batches_of(rows)[0])
        (logps * torch.arange(1, len(logps) + 1)).sum().backward()
        found.append((logps, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_gradient_is_that_of_the_unpacked_sequences() -> None:
    """Backward through mask, gather and chunks, against transformers' logits of each sequence alone."""
    rows = random_rows(4, trees=3)
    packed, plain = tiny_llama(), tiny_llama()
    for batch in batches_of(rows):
        real, generated = pair_logps(ResponseScorer(packed)(batch), batch)
        (2 * real - generated).sum().backward()
    for prompt, real_ids, generated_ids in rows:
        for response, weight in ((real_ids, 2.0), (generated_ids, -1.0)):
            logps = plain(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            (weight * logps[torch.arange(len(response)), torch.tensor(response)].sum()).backward()
    for (name, one), other in zip(packed.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        torch.testing.assert_close(
            one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_pack_of_padding_has_a_graph_with_zero_gradients_for_every_parameter(layout: scoring.Layout) -> None:
    """FSDP2's ranks wait for one another in backward: an empty pack must reach all parameters, with finite zeros."""
    model = tiny_llama()
    logps = ResponseScorer(model, layout)(build_pack((), table_of(random_rows(0, 1)), pack_length=16, pad_id=0))
    assert logps.shape == (0,)
    logps.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


PACKED = [
    tiny_llama, learned_positions, gemma, partial(gemma, attention=1.0), partial(gemma, attention=1.0, window=4),
    granite, windowed, gpt_oss,
]  # fmt: skip
NAMES = ["llama", "gpt2", "gemma", "capped", "capped-windowed", "granite", "windowed", "sinks"]


@pytest.mark.parametrize("make", PACKED, ids=NAMES)
def test_auto_packs_models_whose_attention_and_head_are_known(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Windows, soft-capping, sinks and scaled logits against transformers' own eager attention, row by row."""
    assert choose_layout(make(), "auto", max_length=64) == Choice(layout="packed", attention="trees")
    assert not caplog.records
    rows, scored, plain = random_rows(5, trees=4, longest=12), ResponseScorer(make()), make()
    plain.set_attn_implementation("eager")
    for batch in batches_of(rows):
        with torch.no_grad():
            real, generated = pair_logps(scored(batch), batch)
        for i, row in enumerate(batch.pair_row.tolist()):
            prompt, real_ids, generated_ids = rows[row]
            torch.testing.assert_close(real[i], logp_alone(plain, prompt, real_ids), rtol=0, atol=1e-4)
            torch.testing.assert_close(generated[i], logp_alone(plain, prompt, generated_ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "reason", "choice"),
    [
        (odd_head, "differ", Choice(layout="padded", attention="sdpa", model_logits=True)),
        (mask_ignoring, "differ", Choice(layout="padded", attention="sdpa")),
        (mask_refusing, r"does not take a 4-D mask \(ValueError", Choice(layout="padded", attention="sdpa")),
    ],
)
def test_auto_falls_back_to_padded_with_a_warning_and_right_scores(
    make: Any, reason: str, choice: Choice, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    with caplog.at_level(logging.WARNING):
        found = choose_layout(model, "auto", max_length=64)
    assert found == choice
    assert "padded layout" in caplog.text
    rows = random_rows(5, trees=4, longest=12)
    scorer = found.scorer(model)
    for batch in batches_of(rows):
        real, _ = pair_logps(scorer(batch).detach(), batch)
        alone = [logp_alone(model, *rows[row][:2]) for row in batch.pair_row.tolist()]
        torch.testing.assert_close(real, torch.stack(alone), rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match=reason):
        choose_layout(model, "packed", max_length=64)


def test_soft_capped_attention_is_padded_by_the_models_own() -> None:
    """SDPA would ignore the cap (transformers#32865). Since transformers 5.24 Gemma 2 never takes it."""
    assert choose_layout(gemma(attention=50.0), "padded", max_length=64).attention == "eager"
    uncapped = "sdpa" if Gemma2ForCausalLM._supports_sdpa else "eager"
    assert choose_layout(gemma(), "padded", max_length=64).attention == uncapped


def test_layers_that_hide_their_window_are_padded_however_long_it_is() -> None:
    """The made-up pack is shorter than 16 tokens, so its numbers cannot show the window."""
    model = windowed()
    model.config.sliding_window = 16
    for layer in model.model.layers:
        layer.self_attn.config = tiny_llama().config  # tells its attention of no window
    choice = choose_layout(model, "auto", max_length=64)
    assert choice.layout == "padded"
    with pytest.raises(ModelError, match="attention windows of"):
        choose_layout(model, "packed", max_length=64)


def test_the_probe_leaves_the_model_as_it_is() -> None:
    model = tiny_llama(layers=3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    choose_layout(model, "auto", max_length=64, dtype=torch.bfloat16)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_window_that_no_sequence_outgrows_does_not_matter() -> None:
    """Window 8: a token sees itself and 7 before; sequences of at most 4 + 4 tokens fit."""
    model = windowed()
    assert choose_layout(model, "auto", max_length=8).layout == "packed"
    assert_scores_match(model, "packed", random_rows(5, trees=6, longest=4))
