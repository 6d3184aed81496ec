"""Folders as Mistral and Meta publish them: the model once more, in a layout of their own, beside Hugging Face's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spin_ray.errors import ModelError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.model_folder import open_model
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.learner.hf_folder import copy_other_files
from spin_ray.learner.loading import load_model


@pytest.fixture
def folder(tmp_path):
    """Mistral's files say something else, so that whoever opened them would be noticed."""
    folder = tmp_path / "model"
    shutil.copytree(resolve("embedded:tiny-llama"), folder)
    save_file({"norm.weight": torch.zeros(3)}, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps({"dim": 3}))
    (folder / "tekken.json").write_text("{}")
    return folder


def test_tokenizer_and_weights_are_those_of_hugging_face(folder):
    """transformers takes `tekken.json` first where mistral_common is installed, as it is with vLLM."""
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.is_fast and tokenizer.chat_template
    weights = load_file(folder / "model.safetensors")
    loaded = load_model(open_model(folder, "start").path, trust_remote_code=False).state_dict()
    assert all(torch.equal(loaded[name], weight.to(loaded[name].dtype)) for name, weight in weights.items())


def test_an_iterate_has_one_layout(folder, tmp_path):
    target = tmp_path / "iterate"
    target.mkdir()
    copy_other_files(folder, target, with_code=False)
    names = {path.name for path in target.iterdir()}
    assert "tokenizer.json" in names and not names & {"tekken.json", "params.json", "consolidated.safetensors"}


def test_mistrals_own_layout_alone_is_refused_with_the_cure(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"own format alone \(tekken\.json\); convert it once: python -c"):
        load_tokenizer(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors weights but those of Mistral's own layout; convert them"):
        open_model(folder, "start")


def test_metas_original_weights_are_not_opened_and_not_refused(folder):
    before = open_model(folder, "start")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"\x80")
    assert open_model(folder, "start").digest == before.digest
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="pickled weights"):
        open_model(folder, "start")


@pytest.mark.slow
def test_the_cure_makes_a_tokenizer_with_its_special_tokens(tmp_path):
    """By Mistral's own tekken, whose ids are those of mistral_common."""
    import mistral_common
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from transformers.integrations.mistral import convert_tekken_tokenizer

    file = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    convert_tekken_tokenizer(str(file)).save_pretrained(tmp_path)
    tokenizer, theirs = load_tokenizer(str(tmp_path)), Tekkenizer.from_file(file)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    for text in ("Yes, it is.", " 12 + 7\n\n= 19", "Été 中文"):
        assert tokenizer.encode(text, add_special_tokens=False) == theirs.encode(text, bos=False, eos=False)
