"""Models without weights, and when their files can be read slice by slice. The reading itself: test_two_ranks.py."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from spin_ray.learner.layout import Choice, choose_layout
from spin_ray.learner.loading import empty_model, load_first_layers, materialise, read_shares
from tests.support.learner_cases import VOCAB, save_model, tiny_llama


def test_an_empty_model_has_no_weights_and_the_true_buffers(tmp_path: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(save_model(tmp_path, tiny_llama()))
    model = empty_model(tmp_path)
    assert model is not None
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found, buffers = dict(model.named_buffers()), dict(expected.named_buffers())
    assert found.keys() == buffers.keys() and found
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in found.items())
    assert not torch.nn.Linear(2, 2).weight.is_meta, "the next module has weights again"


def test_files_with_other_names_are_loaded_whole(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_llama())
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["model.old_norm.weight"] = weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    assert empty_model(tmp_path) is None


def test_weights_of_another_layout_beside_the_models_own_are_not_opened(tmp_path: Path) -> None:
    """Mistral's folders have ``consolidated.safetensors``, which may be a pointer of Git LFS."""
    save_model(tmp_path, tiny_llama())
    (tmp_path / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    model = empty_model(tmp_path)
    assert model is not None
    materialise(model, torch.device("cpu"), torch.device("cpu"))
    model.tie_weights()
    shares = dict(model.named_parameters())
    read_shares(shares, tmp_path, model)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(shares[name], weight) for name, weight in stored.items())


def test_the_first_layers_have_every_kind_and_the_true_weights(tmp_path: Path) -> None:
    """Of five layers the third is the first with local attention: three are taken."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=4,
        layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    probe = load_first_layers(tmp_path)
    assert probe.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    weights = dict(model.named_parameters())
    assert len(probe.model.layers) == 3
    assert all(torch.equal(weight, weights[name]) for name, weight in probe.named_parameters())
    found = [choose_layout(whole, "auto", max_length=48) for whole in (probe, model)]
    assert found == [Choice(layout="packed", attention="trees")] * 2
    assert len(model.model.layers) == 5, "what is tried is a copy"


def test_a_model_of_one_layer_is_its_own_start(tmp_path: Path) -> None:
    probe = load_first_layers(save_model(tmp_path, tiny_llama(layers=1)))
    assert len(probe.model.layers) == 1
