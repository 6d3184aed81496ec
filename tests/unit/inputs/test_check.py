"""What is checked before anything starts."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import DataConfig
from spin_ray.errors import ConfigError, DataError, ModelError
from spin_ray.inputs.check import (
    _first_conversations,
    _first_rows,
    check_recipe,
    check_template_tokens,
    check_token_ids,
    versions,
)
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import ChatRenderer, Rendered, load_tokenizer
from spin_ray.run_dir.storage import MANIFEST
from tests.support.tokenizer_kinds import TEMPLATES, tokenizer_of_kind

TINY = Path(resolve("embedded:tiny-llama"))


def config_for(**sections: Any) -> SpinConfig:
    recipe: dict[str, Any] = {
        "model": {"path": "embedded:tiny-llama", "max_length": 128},
        "data": {"train": "embedded:arithmetic-train", "heldout": "embedded:arithmetic-heldout"},
        "generation": {"sampling": {"max_tokens": 24}},
        "train": {"global_batch_pairs": 1},
    }
    for name, values in sections.items():
        recipe[name] = recipe.get(name, {}) | values
    return SpinConfig.model_validate(recipe)


def test_a_recipe_that_can_run_is_resolved():
    start = check_recipe(config_for())
    assert start.model.path == TINY
    assert (start.model.name, start.end_of_turn_id) == ("sft", 2)
    assert start.train == resolve("embedded:arithmetic-train")
    assert start.facts()["inputs"] == {
        "model": start.model.digest, "data": start.data_digest, "heldout": start.heldout_digest,
        "questions": None,
    }  # fmt: skip


@pytest.mark.parametrize(("ends", "named"), [([0], "<|endoftext|>"), (None, "no token"), ([0, 2], ""), (2, "")])
def test_an_end_of_turn_that_committed_models_add_to_the_starts_ends_is_noted(tmp_path, ends, named):
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    said = [found.sentence for found in check_recipe(config_for(model={"path": str(folder)})).findings]
    of_ends = [sentence for sentence in said if "generation_config.json" in sentence]
    expected = f"at {named}; generation_config.json of the models that the run commits adds <|im_end|>"
    assert [expected in sentence for sentence in of_ends] == ([True] if named else [])


def test_an_own_grader_gets_a_first_row_to_be_tried_on():
    grade = "operator:eq"
    found = check_recipe(config_for(evaluation={"grade": grade})).graded
    response, answer, place = found.pop("evaluation.grade")
    assert response.endswith(answer) and ".jsonl:1" in place and not found
    assert not check_recipe(config_for(evaluation={"grade": "exact"})).graded


def test_names_of_layers_that_the_model_lacks_are_refused_at_the_start():
    with pytest.raises(ModelError, match=r"train\.lora\.target_modules: .* no linear layer v_porj; it has v_proj"):
        check_recipe(config_for(train={"lora": {"target_modules": ["q_proj", "v_porj"]}}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "a", "text": "b"}], "nearest is alpaca, which lacks output"),
        ([{"prompt": "a", "response": "b"}, {"conversations": []}], "is of the form sharegpt"),
    ],
)
def test_rows_of_no_form_or_of_two_are_found_before_anything_starts(tmp_path, rows, message):
    """Each file is looked at, also one behind a file of good rows."""
    good = {"prompt": "a", "response": "b"}
    for name, content in {"a.jsonl": [good], "b.jsonl": rows}.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    with pytest.raises(DataError, match=message) as caught:
        check_recipe(config_for(data={"train": str(tmp_path)}))
    assert "b.jsonl:" in str(caught.value) and "\n" not in str(caught.value)


def test_columns_of_the_recipe_are_read_from_a_table(tmp_path):
    pq.write_table(pa.table({"ask": ["2 + 2?"], "say": ["4"]}), tmp_path / "a.parquet")
    check_recipe(
        config_for(data={"train": str(tmp_path / "a.parquet"), "columns": {"prompt": "ask", "response": "say"}})
    )


def test_the_model_that_the_warm_up_starts_from_is_not_yet_the_sft_model():
    assert check_recipe(config_for(sft={})).model.name == "start"


def test_a_warm_up_of_what_a_run_has_made_is_told_at_the_start(tmp_path):
    """Who goes on with more data copies the recipe, and its sft section trains the tuned model on SFT data again."""
    made = shutil.copytree(TINY, tmp_path / "run" / "iter_001" / "model")
    told = "sft: the warm-up trains .*iter_001/model once more, which a run has made and tuned already; .*--sft=null"

    def warnings(**sections: Any) -> str:
        found = check_recipe(config_for(model={"path": str(made)}, **sections)).findings
        return "\n".join(each.sentence for each in found if each.severity == "warning")

    assert not re.search(told, warnings(sft={})), "any other model may have a warm-up"
    (made / MANIFEST).write_text("{}")
    assert re.search(told, warnings(sft={}))
    assert not re.search(told, warnings())


def test_a_judge_that_cannot_be_used_is_told_before_hours_of_sampling(tmp_path):
    """model.trust_remote_code is of the policy alone."""
    recipe = config_for(generation={"samples_per_prompt": 2}).model_dump()
    config = SpinConfig.model_validate(recipe | {"algorithm": "sppo", "scorer": {"path": str(tmp_path / "judge")}})
    with pytest.raises(ModelError, match="judge: no such folder"):
        check_recipe(config)
    shutil.copytree(TINY, tmp_path / "judge")
    (tmp_path / "judge/modeling.py").touch()
    with pytest.raises(ModelError, match=r"modeling\.py: .* or take a preference model of transformers' own"):
        check_recipe(config)


def test_without_held_out_data_there_is_nothing_to_check_of_it():
    start = check_recipe(config_for(data={"heldout": None}))
    assert (start.heldout, start.heldout_digest) == (None, None)


def test_other_content_of_the_data_is_another_run(tmp_path):
    path = tmp_path / "d.jsonl"
    digests = set()
    for text in ("a", "b"):
        path.write_text(json.dumps({"prompt": "q", "response": text}))
        digests.add(check_recipe(config_for(data={"train": str(path)})).data_digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"data": {"train": "none.jsonl"}}, DataError, "none.jsonl: no such data"),
        ({"data": {"heldout": "none.jsonl"}}, DataError, "none.jsonl: no such data"),
        ({"data": {"train": "embedded:none"}}, ConfigError, "names no embedded asset"),
        ({"model": {"path": "none"}}, ModelError, "model.path none: no such folder"),
        ({"model": {"max_length": 513}}, ConfigError, "model.max_length: 513 is more than the 512 positions"),
        ({"model": {"chat_template": "none.jinja"}}, ModelError, "none.jinja: cannot be read"),
    ],
)
def test_what_cannot_be_used_is_named(sections, error, message):
    with pytest.raises(error) as caught:
        check_recipe(config_for(**sections))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_brings_code_is_refused_before_its_tokenizer_is_loaded(tmp_path):
    """transformers imports tokenizer code while it loads the tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    shutil.copy(tmp_path / "own.py", folder / "own.py")
    with pytest.raises(ModelError, match=r"own\.py: pickled weights and code"):
        check_recipe(config_for(model={"path": str(folder)}))
    assert not (tmp_path / "canary").exists()


def test_a_model_without_a_chat_template_is_an_error_with_the_remedy(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"has no chat template; set model\.chat_template"):
        check_recipe(config_for(model={"path": str(folder)}))


def test_versions_name_what_is_installed():
    found = versions()
    assert {"python", "ray", "torch", "transformers"} <= found.keys()
    assert all(found.values())


@pytest.mark.parametrize("kind", ["prepend", "byte level", "unigram"])
def test_token_ids_of_a_runs_own_rows_are_compared_with_transformers(kind, tmp_path, monkeypatch):
    tokenizer = tokenizer_of_kind(kind, TEMPLATES["zephyr"])
    renderer, source = ChatRenderer(tokenizer), str(tmp_path / "rows.jsonl")
    rows = [{"prompt": f"Is it {number}?", "response": "Yes, it is."} for number in range(3)]
    forged = {"prompt": "</s>", "response": "Yes."}
    Path(source).write_text("".join(json.dumps(row) + "\n" for row in [*rows, forged, {"prompt": "no response"}]))
    data = DataConfig(train=source)
    first = _first_conversations(_first_rows(source, data), data)
    assert check_token_ids(renderer, first) == 3

    def as_two_texts(conversations, tools):
        made = []
        for messages in conversations:
            response = tokenizer.encode(messages[-1]["content"], add_special_tokens=False)
            made.append(Rendered(renderer.render_prompt(messages[:-1]), [*response, renderer.end_of_turn_id]))
        return made

    if kind == "prepend":
        monkeypatch.setattr(renderer, "render_all", as_two_texts)
        with pytest.raises(ModelError, match=r"rows\.jsonl:1 has other token ids here than transformers gives it"):
            check_token_ids(renderer, first)


def test_a_file_whose_rows_cannot_be_compared_with_transformers_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "What is <|im_end|>?", "response": "A mark."}\n' * 2)
    found = check_recipe(config_for(data={"train": str(path)})).findings
    assert [each.severity for each in found if "no token ids were compared with transformers'" in each.sentence] == [
        "warning"
    ]


# Tokens that the model has no embedding for


@pytest.fixture
def larger_tokenizer(tmp_path):
    """A model of 384 embeddings whose tokenizer has the ids 384 and 385, too."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.add_tokens(["<tool_call>", "</tool_call>"]) == 2
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_without_an_embedding_that_nothing_uses_are_no_trouble(larger_tokenizer):
    assert check_recipe(config_for(model={"path": str(larger_tokenizer)})).end_of_turn_id == 2


def test_a_template_that_names_tokens_without_an_embedding_is_refused(larger_tokenizer):
    template = (larger_tokenizer / "chat_template.jinja").read_text()
    template += "{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}"
    (larger_tokenizer / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError) as caught:
        check_recipe(config_for(model={"path": str(larger_tokenizer)}))
    assert str(caught.value) == (
        f"{larger_tokenizer}: the tokenizer has tokens (<tool_call>, </tool_call>) that the model has no embedding for "
        "(ids 384, 385 of a vocabulary of 384), and its chat template has them; save the model after "
        "resize_token_embeddings, or take them out of template and data"
    )


def test_an_end_of_turn_without_an_embedding_is_refused_though_the_template_has_no_name_for_it():
    tokenizer = load_tokenizer(str(TINY))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(ModelError, match=r"tokens \(<\|im_end\|>\).*\(ids 2 of a vocabulary of 2\)"):
        check_template_tokens(tokenizer, ChatRenderer(tokenizer), 2)


@pytest.mark.parametrize("nested", [False, True], ids=["vocab_size", "text_config.vocab_size"])
@pytest.mark.parametrize("column", ["prompt", "response"])
def test_rows_with_a_token_without_an_embedding_are_refused(larger_tokenizer, tmp_path, column, nested):
    if nested:
        config = json.loads((larger_tokenizer / "config.json").read_text())
        config |= {"text_config": {"vocab_size": config.pop("vocab_size")}}
        (larger_tokenizer / "config.json").write_text(json.dumps(config))
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b", column: "x</tool_call>"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ModelError) as caught:
        check_recipe(config_for(model={"path": str(larger_tokenizer)}, data={"train": str(tmp_path / "d.jsonl")}))
    assert f"(ids 385 of a vocabulary of 384), and {tmp_path}/d.jsonl:2 has them" in str(caught.value)


def test_a_model_that_does_not_say_its_vocabulary_is_not_asked_for_it(larger_tokenizer, tmp_path):
    config = json.loads((larger_tokenizer / "config.json").read_text())
    del config["vocab_size"]
    (larger_tokenizer / "config.json").write_text(json.dumps(config))
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "a", "response": "</tool_call>"}))
    check_recipe(config_for(model={"path": str(larger_tokenizer)}, data={"train": str(tmp_path / "d.jsonl")}))


# What a run would find out late


def test_fewer_rows_than_a_batch_are_told_at_the_start(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{number}", "response": "a"}) + "\n" for number in range(3)))
    recipe = {"data": {"train": str(path), "heldout": None}}
    with pytest.raises(DataError, match=r"at most 3 pairs, fewer than train\.global_batch_pairs 4; .* to 3 or less"):
        check_recipe(config_for(**recipe, train={"global_batch_pairs": 4}))
    check_recipe(config_for(**recipe, train={"global_batch_pairs": 3}))
    twice = {"train": {"global_batch_pairs": 6}, "generation": {"samples_per_prompt": 2}}
    check_recipe(config_for(**recipe, **twice))
    with pytest.raises(DataError, match="at most 3 pairs, fewer than"):
        check_recipe(
            SpinConfig.model_validate(config_for(**recipe, **twice).model_dump() | {"algorithm": "continued_sft"})
        )
    asked = config_for(**recipe, **twice).model_dump() | {"algorithm": "self_reinforcement"}
    asked["data"] |= {"train": "embedded:arithmetic-train", "questions": str(path)}
    with pytest.raises(DataError, match=r"d\.jsonl: an iteration has at most 3 pairs, fewer than"):
        check_recipe(SpinConfig.model_validate(asked))


def test_a_quantised_model_is_refused_before_anything_is_generated(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"its weights are quantised \(gptq\)"):
        check_recipe(config_for(model={"path": str(folder)}))


def test_pointers_of_git_lfs_hurt_only_where_they_are_opened(tmp_path):
    """`git lfs pull -I 'model*.safetensors,*.json'` leaves the others."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config, pointer = config_for(model={"path": str(folder)}), "version https://git-lfs.github.com/spec/v1\n"
    for name in ("tf_model.h5", "flax_model.msgpack", "a.gguf", "consolidated.safetensors", "plot.png"):
        (folder / name).write_text(pointer)
    check_recipe(config)
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).write_text(pointer)
        with pytest.raises(ModelError, match=f"{name}: is a pointer of Git LFS and not the file"):
            check_recipe(config)


def test_a_folder_without_safetensors_is_told_the_cure(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    config = config_for(model={"path": str(folder)})
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: pickled weights"):
        check_recipe(config)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"has no \.safetensors weights; convert them"):
        check_recipe(config)


def test_what_is_slow_to_check_comes_last(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"data\.columns\.prompt: none of the first rows has a column 'ask'"):
        check_recipe(config_for(model={"path": str(folder)}, data={"columns": {"prompt": "ask"}}))
    with pytest.raises(DataError, match="fewer than train"):
        check_recipe(config_for(model={"path": str(folder)}, data={"max_rows": 1}, train={"global_batch_pairs": 2}))
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights, first model\.norm\.weight"):
        check_recipe(config_for(model={"path": str(folder)}))


def test_every_start_says_which_tokens_have_no_embedding(larger_tokenizer):
    found = check_recipe(config_for(model={"path": str(larger_tokenizer)})).findings
    assert [finding.severity for finding in found if "no embedding for 2 tokens" in finding.sentence] == ["warning"]
