"""lm-eval's models beside plain transformers: what is asked, where answers end, and what is cut from them."""

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin_ray.errors import ConfigError
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.template_variables import TemplateVariables
from spin_ray.report import harness_warnings
from spin_ray.report.harness_models import arguments_of, open_model
from spin_ray.report.harness_request import Request

pytestmark = pytest.mark.slow

DATE = datetime(2026, 1, 1)
ASKED = [{"role": "user", "content": "hi"}]
THOUGHT = "<think>ab\n\ncd</think>"


def opened(folder: str | Path, **given: Any) -> Any:
    request = Request(model=str(folder), name="iter-0", benchmarks=(), **given)
    return open_model(*arguments_of(request), request)


def answer(model: Any, prompts: Sequence[Any], until: Sequence[str] = (), most: int = 24) -> list[str]:
    from lm_eval.api.instance import Instance

    options = {"until": list(until), "max_gen_toks": most, "do_sample": False}
    return model.generate_until(
        [Instance("generate_until", {}, (prompt, options), 0, ("mine", 0, 1)) for prompt in prompts]
    )


def copy_of_tiny(folder: Path) -> Path:
    shutil.copytree(resolve("embedded:tiny-llama"), folder)
    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def with_bos(tmp_path: Path) -> Path:
    """A model whose tokenizer writes a BOS, as Llama's and Mistral's do."""
    folder = copy_of_tiny(tmp_path / "bos")
    bos = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(0)
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    change(
        folder / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
        },
    )  # fmt: skip
    change(folder / "tokenizer_config.json", bos_token=bos, tokenizer_class="PreTrainedTokenizerFast")
    return folder


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that thinks, says yes, ends its turn, and goes on; the end of its turn is not its EOS."""
    folder = copy_of_tiny(tmp_path_factory.mktemp("models") / "chatty")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    said = tokenizer(f"{THOUGHT}yes<|im_end|>\n<|im_start|>user", add_special_tokens=False).input_ids
    ids, labels = torch.tensor([prompt + said]), torch.tensor([[-100] * len(prompt) + said])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(ids, labels=labels).loss
        if loss.item() < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        change(folder / name, eos_token_id=0)
    eos = tokenizer.convert_ids_to_tokens(0)
    change(folder / "tokenizer_config.json", eos_token=eos, pad_token=eos)
    return folder


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that repeats what it was asked first; yields its URL and all that it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            text = asked[-1]["messages"][0]["content"] if "messages" in asked[-1] else "one"
            body = json.dumps({"choices": [{"index": 0, "text": text, "message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", asked
    http.shutdown()
    http.server_close()


def test_an_endpoint_gets_the_bos_that_the_tokenizer_writes(with_bos, endpoint):
    """Without it a model such as Llama answers otherwise than on the other back ends."""
    url, asked = endpoint
    for folder in (with_bos, Path(resolve("embedded:tiny-llama"))):
        answer(opened(folder, endpoint=url, max_length=64), ["hello"])
        assert asked[-1]["prompt"] == [AutoTokenizer.from_pretrained(folder)("hello").input_ids]


@pytest.mark.parametrize("beginning", ["", "{{ bos_token }}"])
def test_a_conversation_has_no_bos_but_its_templates(with_bos, beginning):
    file = with_bos / "chat_template.jinja"
    file.write_text(beginning + file.read_text())
    model, tokenizer = opened(with_bos, chat=True), AutoTokenizer.from_pretrained(with_bos)
    expected = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    prompt = model.apply_chat_template(ASKED)
    assert model.tok_encode(prompt) == model.tok_batch_encode([prompt])[0][0].tolist() == expected


@pytest.mark.parametrize(
    ("template", "variables", "until", "expected"),
    [
        ("", {}, [], f"{THOUGHT}yes"),
        ("{# </think> #}", {}, ["\n\n", "es"], "y"),
        ("{# </think> #}{% if enable_thinking %}{% endif %}", {"enable_thinking": False}, ["\n\n"], "<think>ab"),
    ],
    ids=["no thoughts", "thoughts", "thoughts are off"],
)
def test_an_answer_ends_with_its_turn_and_has_no_thought(chatty, template, variables, until, expected):
    """A task's own ends hold behind the thought."""
    template += (chatty / "chat_template.jinja").read_text()
    given = {"chat": True, "variables": TemplateVariables(variables, DATE), "chat_template": template}
    model = opened(chatty, **given)
    assert answer(model, [model.apply_chat_template(ASKED)], until) == [expected]


@pytest.mark.parametrize(
    ("opening", "said", "times"),
    [("", "<think>ab", 1), ("", "yes", 0), ("<think>\n", "ab", 1), ("<think>\n", "ab</think>yes", 0)],
)
def test_a_thought_without_an_end_is_told(endpoint, opening, said, times):
    """The longest answer of a task may cut it off."""
    folder = resolve("embedded:tiny-llama")
    template = "{# </think> #}" + (Path(folder) / "chat_template.jinja").read_text()
    template += f"{{% if add_generation_prompt %}}{{{{ {opening!r} }}}}{{% endif %}}"
    model = opened(folder, endpoint=endpoint[0], chat=True, max_length=64, chat_template=template)
    with harness_warnings.counted() as texts:
        found = answer(model, [model.apply_chat_template([{"role": "user", "content": said}])])
    assert (sum(texts.values()), found) == (times, [said.rpartition("</think>")[2]])


@pytest.mark.parametrize("named", [[0], [0, 2]], ids=["the start's folder", "an iterate's folder"])
def test_without_a_chat_an_answer_ends_alike_for_start_and_iterates(chatty, tmp_path, named):
    """An iterate's folder names the end of turn that it was trained with."""
    folder = shutil.copytree(chatty, tmp_path / "folder")
    change(folder / "generation_config.json", eos_token_id=named)
    asked = AutoTokenizer.from_pretrained(folder).apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    assert answer(opened(folder), [asked]) == [f"{THOUGHT}yes"]


def test_an_end_that_is_no_special_token_is_cut_off_too(chatty, tmp_path):
    folder = shutil.copytree(chatty, tmp_path / "plain")
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    extra = [token for token in settings.get("extra_special_tokens", []) if token != "<|im_end|>"]
    settings.pop("additional_special_tokens", None)
    change(folder / "tokenizer_config.json", extra_special_tokens=extra)
    model = opened(folder, chat=True)
    assert model.tokenizer.decode([2], skip_special_tokens=True) == "<|im_end|>"
    assert answer(model, [model.apply_chat_template(ASKED)]) == [f"{THOUGHT}yes"]


def test_the_end_of_a_thought_is_found_where_it_is_a_special_token(tmp_path):
    """transformers leaves special tokens out of its texts."""
    folder = copy_of_tiny(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    tokenizer.chat_template = "{# </think> #}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    model = opened(folder, chat=True)
    assert model.tok_decode(tokenizer("a</think>b<|im_end|>").input_ids) == "a</think>b"


def test_settings_of_generation_beside_the_weights_change_no_answer(tmp_path):
    """Of the back ends, only ``hf`` heeded them."""
    folder = copy_of_tiny(tmp_path / "tiny")
    expected = answer(opened(folder), ["hello"])
    change(folder / "generation_config.json", no_repeat_ngram_size=1, repetition_penalty=2.0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    heeded = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert answer(opened(folder), ["hello"]) == expected != [tokenizer.decode(heeded, skip_special_tokens=True)]


def test_a_task_that_samples_draws_from_all_tokens():
    """transformers draws from the likeliest 50 unless it is told otherwise, vLLM from all."""
    model = opened(resolve("embedded:tiny-llama")).model
    torch.manual_seed(1)  # of some seeds the answer is two tokens long
    ids = model.generate(torch.tensor([[5, 6, 7]]), do_sample=True, max_new_tokens=64)[0]
    logits = model(ids[None]).logits[0, 2:-1]
    drawn = logits.gather(1, ids[3:, None])
    assert (logits > drawn).sum(1).max() >= 50


def test_cut_questions_of_an_endpoint_are_counted(endpoint):
    """lm-eval looks for them once they are cut; where nothing is left of them it sent their last few tokens."""
    url, asked = endpoint
    folder = resolve("embedded:tiny-llama")
    model, tokenizer = opened(folder, endpoint=url, max_length=33), AutoTokenizer.from_pretrained(folder)
    with harness_warnings.counted() as texts:
        answer(model, ["x " * 50, "x", "x " * 60], most=16)
    assert texts == {"prompt (N tokens) exceeds N; its beginning is cut off": 2}
    assert max(len(each["prompt"][0]) for each in asked) == 16 < len(tokenizer("x " * 50).input_ids)
    with pytest.raises(ConfigError, match=r"--tasks mine: .*32 tokens \(max_gen_toks\).* longer --max-length"):
        answer(model, ["x"], most=32)


def test_a_chat_endpoints_answer_is_cut_at_all_ends_of_its_task(endpoint):
    """It gets four of them at most, and thoughts may hold any."""
    url, asked = endpoint
    stops = ["S1", "S2", "S3", "S4", " S5"]
    folder = resolve("embedded:tiny-llama")
    said = [{"role": "user", "content": f"{THOUGHT}one S5 two"}]
    model = opened(folder, endpoint=url, chat=True, max_length=64)
    with harness_warnings.counted() as texts:
        prompt = model.apply_chat_template([*said, {"role": "assistant", "content": "So"}], add_generation_prompt=False)
    assert list(texts) == [
        "the task begins the answer (gen_prefix): spin-ray serve goes on with it, another server may begin anew"
    ]
    assert answer(model, [prompt], stops) == [f"{THOUGHT}one"]
    thinks = "{# </think> #}" + (Path(folder) / "chat_template.jinja").read_text()
    model = opened(folder, endpoint=url, chat=True, max_length=64, chat_template=thinks)
    assert answer(model, [model.apply_chat_template(said)], ["ab", *stops]) == ["one"]
    assert [each["stop"] for each in asked] == [stops[:4], []]
