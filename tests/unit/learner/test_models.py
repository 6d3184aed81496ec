"""Families of 2026 against transformers alone (table: docs/models.md), and traits that only long sequences show."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from spin_ray.errors import ModelError
from spin_ray.learner import layout_probe
from spin_ray.learner.layout import Choice, choose_layout
from spin_ray.learner.loading import first_layers
from tests.support.learner_cases import one_rank
from tests.support.model_kinds import KINDS, LONGROPE, MAX_LENGTH, ModelKind
from tests.support.model_matrix import examine


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    with one_rank(tmp_path_factory.mktemp("group")):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_scores_gradients_and_export_are_transformers_own(name: str, tmp_path: Path) -> None:
    """The gradient is that of SPIN's loss by autograd through eager attention, one response at a time, in fp32."""
    found = examine(KINDS[name], tmp_path)
    assert found.layout == KINDS[name].layout
    assert found.logps < 1e-4
    assert found.gradients < 1e-3
    assert found.loss == pytest.approx(found.plain_loss, abs=1e-5)
    assert found.moved > 1e-4
    assert found.export < 1e-4
    assert found.same_names


def test_every_family_is_one_that_vllm_names() -> None:
    """vLLM's table is read as text: importing vLLM takes seconds. benchmarks/models.py asks vLLM itself."""
    assert transformers.__file__
    table = Path(transformers.__file__).parents[1] / "vllm" / "model_executor" / "models" / "registry.py"
    named = set(re.findall(r'"(\w+)": \(', table.read_text()))
    assert {type(kind.make()).__name__ for kind in KINDS.values()} <= named


# Traits that a short probe does not show


def choose(model: Any, wanted: Any = "auto", max_length: int = MAX_LENGTH) -> Choice:
    return choose_layout(model, wanted, max_length=max_length)


SWITCHING = {
    "longrope": ModelKind("phi3", LONGROPE),
    "dynamic": ModelKind(
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
         "max_position_embeddings": 100},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHING)
def test_a_rotary_embedding_that_changes_with_the_length_is_refused_beyond_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest row of a batch would decide the positions of all others. The limit is 100 tokens."""
    model = SWITCHING[name].make()
    assert choose(model, max_length=100).layout == "packed"
    reason = "its rotary embedding changes for sequences longer than 100 tokens; set model.max_length to at most that"
    with pytest.raises(ModelError, match=reason):
        choose(model, max_length=101)
    monkeypatch.setattr(layout_probe, "rope_limit", lambda config: None)
    with pytest.raises(ModelError):  # the numbers show it, too
        choose(model, max_length=128)


def test_a_model_whose_tokens_see_what_follows_them_is_refused() -> None:
    """Such are encoders: their own scores agree with themselves in every layout."""
    with pytest.raises(ModelError, match="BertLMHeadModel: its tokens see what follows them; SPIN needs a causal"):
        choose(ModelKind("bert").make(), "padded")


def test_sparse_attention_is_packed_only_if_every_token_is_taken() -> None:
    """It is chosen in the mask, which packs do not read; the probe's short rows are shorter than the 16 taken."""
    sparse = {"index_n_heads": 2, "index_head_dim": 16}
    latent = KINDS["DeepSeek-V3"].settings
    few, every = (ModelKind("deepseek_v32", latent | sparse | {"index_topk": taken}).make() for taken in (16, 64))
    with pytest.raises(ModelError, match="packed log-probabilities differ"):
        choose(few, "packed")
    assert choose(every).layout == "packed"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attention_chunk_size": 12, "attn_temperature_tuning": False}, "attends within chunks of 12 tokens"),
        ({"attention_chunk_size": 64, "floor_scale": 8192}, "temperature counts places in the pack, not positions"),
        ({"attention_chunk_size": 64, "attn_temperature_tuning": False}, None),
    ],
)
def test_what_depends_on_places_is_packed_only_where_no_pack_shows_it(
    settings: dict[str, Any], reason: str | None
) -> None:
    """Packs may be longer than all that is tried: the temperature changes at place 8192."""
    model = KINDS["Llama 4 (text)"].make(**settings)
    if reason is None:
        assert choose(model).layout == "packed"
    else:
        with pytest.raises(ModelError, match=reason):
            choose(model, "packed")


def test_a_layer_of_its_own_kind_is_tried_however_late_it_comes() -> None:
    """The third of four layers is the first convolution, and no setting names it."""
    kinds = ["full_attention", "full_attention", "conv", "full_attention"]
    model = ModelKind("lfm2", {"num_hidden_layers": 4, "layer_types": kinds}).make()
    model.config.layer_types = ["full_attention"] * 4
    assert len(first_layers(model).model.layers) == 3


def test_a_forward_pass_that_fails_is_named() -> None:
    model = KINDS["Llama"].make()
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 31)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: its own forward pass fails \(RuntimeError"):
        choose(model)
