"""Models that a run commits, read by transformers alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import LoraConfig
from spin_ray.report.export import export
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import Storage
from tests.support import small_run

TEXT_END, TURN_END = 0, 2
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OTHERS = "the start's own"


def change(file: Path, **values: Any) -> None:
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | values))


def base_model(config: SpinConfig, folder: Path) -> SpinConfig:
    """Returns the recipe with a start that ends texts at ``<|endoftext|>``, and has chat templates in four places."""
    start = folder / "model"
    shutil.copytree(config.model.path, start)
    change(start / "tokenizer_config.json", eos_token="<|endoftext|>", chat_template=OTHERS)
    change(start / "config.json", eos_token_id=TEXT_END)
    (start / "generation_config.json").write_text(json.dumps({"eos_token_id": TEXT_END, "temperature": 0.6}))
    (start / "chat_template.jinja").write_text(OTHERS)
    change(start / "chat_template.json", chat_template=OTHERS)
    (start / "additional_chat_templates").mkdir()
    (start / "additional_chat_templates/tool_use.jinja").write_text(OTHERS)
    (folder / "chatml.jinja").write_text(TEMPLATE)
    model = config.model.model_copy(update={"path": str(start), "chat_template": str(folder / "chatml.jinja")})
    return config.model_copy(update={"model": model, "iterations": 2})


def adapters(config: SpinConfig) -> SpinConfig:
    return config.with_train(lora=LoraConfig(rank=2, alpha=4, merge=False))


@pytest.mark.parametrize("kind", ["whole", "adapter", "exported adapter"])
def test_generate_stops_at_the_end_that_was_trained_and_every_reader_finds_the_recipes_template(
    tmp_path: Path, config: SpinConfig, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """transformers takes chat_template.jinja first, ``tool_use`` for tools; llama.cpp reads tokenizer_config.json."""
    monkeypatch.setattr(small_run, "_models", {})  # of equal weights, but with another config.json
    recipe = base_model(config, tmp_path)
    if kind != "whole":
        pytest.importorskip("peft", reason="the extra `lora` is not installed")
        recipe = adapters(recipe)
    small_run.run(recipe, tmp_path / "run")
    run = RunDir(Storage(tmp_path / "run"))
    for iterate in (1, 2):
        folder = run.storage.path(run.model(iterate).path)
        if kind == "exported adapter":
            folder = Path(export(run, str(iterate - 1), tmp_path / f"out {iterate}"))
        found = json.loads((folder / "generation_config.json").read_text())
        assert found == {"eos_token_id": [TEXT_END, TURN_END], "temperature": 0.6}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (tokenizer.chat_template, tokenizer.eos_token) == (TEMPLATE, "<|endoftext|>")
        assert not [file for file in folder.rglob("*") if file.is_file() and OTHERS.encode() in file.read_bytes()]
        if kind != "adapter":
            start = json.loads((tmp_path / "model/config.json").read_text())
            assert json.loads((folder / "config.json").read_text()) == start
            assert said_by(folder)[-1] == TURN_END


def said_by(folder: Path) -> list[int]:
    """Returns what ``generate`` writes, with a head that always prefers the end of turn."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.forward = lambda hidden: torch.eye(model.config.vocab_size)[TURN_END].expand(*hidden.shape[:2], -1)
    return model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False)[0, 3:].tolist()


def test_an_adapter_of_a_start_without_generation_config_names_both_ends(tmp_path: Path, config: SpinConfig) -> None:
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    recipe = adapters(base_model(config, tmp_path))
    (tmp_path / "model/generation_config.json").unlink()
    small_run.run(recipe, tmp_path / "run")
    found = json.loads((tmp_path / "run/iter_000/adapter/generation_config.json").read_text())
    assert found["eos_token_id"] == [TEXT_END, TURN_END]
