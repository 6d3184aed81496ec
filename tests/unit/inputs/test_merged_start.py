"""A start model given as an adapter: what it is merged to, and the adapters that are refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_ray.config.sections import ModelConfig
from spin_ray.errors import ModelError
from spin_ray.inputs.merged_start import without_adapter
from tests.support.learner_cases import save_model, tiny_llama

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")
IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter with rank-stabilised scaling, which plain alpha / rank would merge wrongly."""
    monkeypatch.setenv("SPIN_RAY_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "base", tiny_llama())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, use_rslora=True, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_start_is_the_adapter_on_its_model_made_once(adapter: Path, tmp_path: Path) -> None:
    found = without_adapter(adapter, ModelConfig(path=str(adapter)))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = peft.PeftModel.from_pretrained(base, adapter)(IDS).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(found)(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    made = (found / "config.json").stat().st_mtime_ns
    (tmp_path / "base").rename(tmp_path / "moved")
    again = without_adapter(adapter, ModelConfig(path=str(adapter), base=str(tmp_path / "moved")))
    assert again != found, "another path may be another model"
    (tmp_path / "moved").rename(tmp_path / "base")
    assert without_adapter(adapter, ModelConfig(path=str(adapter))) == found
    assert (found / "config.json").stat().st_mtime_ns == made


def test_the_merged_model_has_its_models_config_and_the_adapters_chat_template_alone(adapter: Path, tmp_path: Path):
    """transformers would take ``tool_use`` of the base, and refuses to save a temperature without do_sample."""
    base = tmp_path / "base"
    config = json.loads((base / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    config |= {"rope_theta": 500.0, "torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 2}))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("base")
    kept = without_adapter(adapter, ModelConfig(path=str(adapter)))
    assert json.loads((kept / "config.json").read_text()) == config
    assert json.loads((kept / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": 2}
    assert (kept / "additional_chat_templates/tool_use.jinja").is_file()
    (adapter / "chat_template.jinja").write_text("adapter")
    found = without_adapter(adapter, ModelConfig(path=str(adapter)))
    assert (found / "chat_template.jinja").read_text() == "adapter"
    assert not (found / "additional_chat_templates").exists()


def test_what_is_no_adapter_stays_and_takes_no_base(tmp_path: Path) -> None:
    assert without_adapter(tmp_path, ModelConfig(path=str(tmp_path))) == tmp_path
    with pytest.raises(ModelError, match=r"model\.base: .* is no adapter; leave model\.base out"):
        without_adapter(tmp_path, ModelConfig(path=str(tmp_path), base="org/base"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_model_name_or_path": None}, "names no model; set model.base"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "model.base /nowhere/at/all: no such folder"),
        ({"peft_type": "PREFIX_TUNING"}, "is a PREFIX_TUNING adapter"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_with_the_cure(adapter: Path, changes, reason: str) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(ModelError, match=reason):
        without_adapter(adapter, ModelConfig(path=str(adapter)))


def test_an_adapter_on_an_adapter_or_of_another_shape_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is an adapter of .*, not a model"):
        without_adapter(adapter, ModelConfig(path=str(adapter), base=str(adapter)))
    save_model(tmp_path / "wider", tiny_llama(hidden=64))
    with pytest.raises(ModelError, match=r"cannot be merged into .*wider"):
        without_adapter(adapter, ModelConfig(path=str(adapter), base=str(tmp_path / "wider")))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"without adapter_model\.safetensors; save it as safetensors"):
        without_adapter(adapter, ModelConfig(path=str(adapter)))
