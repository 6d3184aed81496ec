"""Files of a model folder that other programs read, in the form in which models are published."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spin_ray.learner.hf_folder import load_model, write_model
from spin_ray.learner.published import has_template, name_end, remove_templates
from tests.support.model_kinds import KINDS

_LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN = {
    "type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama": {"rope_theta": 500000.0, "rope_scaling": _LLAMA_3, "torch_dtype": "bfloat16"},
    "Mistral": {"rope_theta": 1000000.0, "torch_dtype": "bfloat16", "mine": {"b": [1], "a": None}},
    "Gemma 3 (text)": {
        "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "torch_dtype": "bfloat16",
    },
    "Qwen3-MoE": {"rope_theta": 1000000.0, "rope_scaling": None, "num_experts": 4, "torch_dtype": "float16"},
    "DeepSeek-V3": {"rope_theta": 20000, "rope_scaling": _YARN, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "Phi-4": {"rope_theta": 10000.0, "rope_scaling": _LONG, "dtype": "bfloat16"},
}  # fmt: skip
"""Keys of published config.json files, most of which transformers 5 replaces by others when it writes."""
_NEW = ("rope_parameters", "num_local_experts", "dtype", "layer_types", "architectures")


@pytest.mark.parametrize("kind", PUBLISHED)
def test_config_json_has_the_published_keys_and_values_of_the_start(tmp_path: Path, kind: str) -> None:
    """Programs that do not know transformers' new keys would silently take a default, e.g. of the rotary base."""
    start, target = tmp_path / "start", tmp_path / "target"
    KINDS[kind].make().save_pretrained(start)
    written = json.loads((start / "config.json").read_text())
    config = {key: value for key, value in written.items() if key not in _NEW} | PUBLISHED[kind]
    (start / "config.json").write_text(json.dumps(config))
    model = load_model(start, trust_remote_code=False)
    export(model, start, target)
    expected = config | {"architectures": written["architectures"]}
    expected |= {key: "float32" for key in ("torch_dtype", "dtype") if key in config} or {"torch_dtype": "float32"}
    assert json.loads((target / "config.json").read_text()) == expected
    ids = torch.arange(3, 58)[None]
    again = AutoModelForCausalLM.from_pretrained(target, attn_implementation=model.config._attn_implementation)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


def export(model: Any, start: Path, target: Path) -> None:
    target.mkdir()
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    if not model.config.tie_word_embeddings:
        weights = model.state_dict()
    write_model(target, model, {*weights}, weights.items(), dtype=torch.float32, source=start, with_code=False)


def test_a_change_of_the_model_is_written_and_what_its_old_keys_cannot_say_is_left_to_transformers(
    tmp_path: Path,
) -> None:
    start = tmp_path / "start"
    KINDS["Llama"].make().save_pretrained(start)
    config = json.loads((start / "config.json").read_text())
    rope = config.pop("rope_parameters") | {"rope_theta": 500.0}
    (start / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0, "pad_token_id": 0}))
    for number, (values, kept) in enumerate((({"pad_token_id": 5}, True), ({"rope_parameters": rope}, True),
                                             ({"rope_parameters": rope | {"rope_theta": 9.0}}, False))):  # fmt: skip
        model = load_model(start, trust_remote_code=False)
        for name, value in values.items():
            setattr(model.config, name, value)
        target = tmp_path / f"target {number}"
        export(model, start, target)
        assert ("rope_theta" in json.loads((target / "config.json").read_text())) == kept
        found = AutoConfig.from_pretrained(target)
        assert all(getattr(found, name) == value for name, value in values.items())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"eos_token_id": 1, "top_k": 9}, {"eos_token_id": [1, 2], "top_k": 9}),
        ({"eos_token_id": [3, 2]}, {"eos_token_id": [3, 2]}),
        ({"eos_token_id": 2}, {"eos_token_id": 2}),
        ({"top_k": 9}, {"top_k": 9, "eos_token_id": [5, 2]}),
    ],
)
def test_an_end_is_added_behind_the_starts_own(tmp_path: Path, before: Any, after: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(before))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    name_end(tmp_path, 2, tmp_path, trust_remote_code=False)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == after


@pytest.mark.parametrize(
    "file",
    ["chat_template.jinja", "chat_template.json", "additional_chat_templates/x.jinja", "tokenizer_config.json",
     "processor_config.json"],
)  # fmt: skip
def test_a_chat_template_is_found_and_removed_wherever_a_program_looks(tmp_path: Path, file: str) -> None:
    assert not has_template(tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('{"chat_template": "x", "eos_token": "</s>"}')
    assert has_template(tmp_path)
    remove_templates(tmp_path)
    assert not has_template(tmp_path)
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {name: json.loads(text) for name, text in left.items()} == (
        {file: {"eos_token": "</s>"}} if file.endswith("_config.json") else {}
    )
