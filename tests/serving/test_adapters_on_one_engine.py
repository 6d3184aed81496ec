"""All iterates of a run of adapters on one engine: real Ray Serve and vLLM; PEFT says what each would write."""

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import load_tokenizer
from spin_ray.run_dir.run_dir import RunDir
from tests.support.ray_head import free_port
from tests.support.served import START_S, Served, serving
from tests.support.tiny_runs import make_adapter_run

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]
HALF = "\N{REPLACEMENT CHARACTER}"
"""A last character of which a token is missing; vLLM leaves it out."""
PROMPTS, TOKENS = ([5, 6, 7, 8], [9, 10, 11]), 16
FAILS_ON_A_SIGNAL = """
import signal

def fail(*_):
    raise MemoryError("none is left")

signal.signal(signal.SIGUSR2, fail)
"""
"""Code that each process of the server runs first. Without memory in truth, an engine may also end by a signal."""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters") / "log"


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[Served]:
    model = shutil.copytree(resolve("embedded:tiny-llama"), log.parent / "model")  # a test damages it
    run, port = make_adapter_run(log.parent / "run", iterates=2, model=str(model)), free_port()
    command = [sys.executable, "-m", "spin_ray", "serve", str(run.storage.root), "--models", "all"]
    names = ("sft", "iter-0", "iter-1")
    (log.parent / "sitecustomize.py").write_text(FAILS_ON_A_SIGNAL)
    paths = [str(log.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        with serving(run, port, [*command, "--port", str(port)], log, {name: name for name in names}) as found:
            yield found


def expected(run: RunDir, iterate: int) -> list[str]:
    """Greedy answers of transformers, with PEFT's adapter on top."""
    start = run.description()["start_model"]
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    if iterate:
        model = peft.PeftModel.from_pretrained(model, run.adapter(iterate).local_folder())
    answers = [
        model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)[0, len(prompt) :]
        for prompt in PROMPTS
    ]
    texts = load_tokenizer(start).batch_decode(answers, skip_special_tokens=True)
    return [text.rstrip(HALF) for text in texts]


def answer(client: openai.OpenAI, name: str, prompt: list[int]) -> str:
    made = client.completions.create(model=name, prompt=prompt, max_tokens=TOKENS, temperature=0)
    assert made.model == name
    return made.choices[0].text.rstrip(HALF)


def test_three_iterates_answer_together_from_one_engine_as_peft_would(server: Served) -> None:
    client = server.client()
    asked = [(name, prompt) for name in ("sft", "iter-0", "iter-1") for prompt in PROMPTS]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda question: answer(client, *question), asked))
    references = [text for iterate in range(3) for text in expected(server.run, iterate)]
    assert found == references
    assert len(set(references)) == len(references), "each iterate answers in its own way"
    assert len(server.replicas("engine.")) == 1


def test_scores_of_prompts_in_one_batch_are_each_iterates_own(server: Served) -> None:
    """vLLM on CPU died of the second request: its head took one adapter for each request, and a row for each token."""
    (engine,) = server.replicas("engine.")
    asked = [(name, prompt) for name in ("sft", "iter-0", "iter-1") for prompt in PROMPTS] * 2

    def score(name: str, prompt: list[int]) -> list[float]:
        made = server.client().completions.create(
            model=name, prompt=prompt, max_tokens=0, echo=True, logprobs=0, temperature=0
        )
        return made.choices[0].logprobs.token_logprobs[1:]

    alone = {name: score(name, PROMPTS[0]) for name in ("sft", "iter-0", "iter-1")}
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda question: score(*question), asked))
    assert server.replicas("engine.") == [engine]
    assert [together[asked.index((name, PROMPTS[0]))] for name in alone] == [
        pytest.approx(each, abs=1e-4) for each in alone.values()
    ]
    assert len({tuple(np.round(each, 3)) for each in alone.values()}) == 3, "each iterate scores in its own way"


def test_an_engine_that_died_loads_the_adapters_again(server: Served) -> None:
    client = server.client()
    before = answer(client, "iter-1", PROMPTS[0])
    (engine,) = server.replicas("engine.")
    engine.kill()
    engine.wait(30)
    assert answer_once_back(client, "iter-1") == before


def answer_once_back(client: openai.OpenAI, name: str) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            return answer(client, name, PROMPTS[0])
        except openai.InternalServerError:
            time.sleep(0.5)
    raise AssertionError(f"{name} was not back within {START_S} s")


@contextmanager
def damaged(file: Path) -> Iterator[None]:
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        yield
    finally:
        file.write_bytes(sound)


def told(server: Served, words: str) -> str:
    """Returns what is said of iter-1 once ``words`` are in it; empty words: once it serves."""
    deadline = time.monotonic() + START_S
    while words not in (said := server.problems().get("iter-1", "")) or bool(said) != bool(words):
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
    return said


def test_why_an_engine_ends_does_not_start_again_and_cannot_load_an_adapter_is_told(server: Served, log: Path) -> None:
    client = server.client()
    told(server, "")
    with damaged(log.parent / "model/model.safetensors"):
        (core,) = server.engines()
        core.send_signal(signal.SIGUSR2)
        ended = told(server, "has ended (")
        with pytest.raises(openai.InternalServerError):  # the front knows; before, the question would wait or be blamed
            answer(client, "iter-1", PROMPTS[0])
        assert re.fullmatch(r"its engine has ended \((.+: )?MemoryError: none is left\) and starts again", ended)
        unusable = told(server, "cannot start again")
        assert "changed after it was checked; restore it" in unusable
    with damaged(Path(server.run.storage.path("iter_000/adapter/adapter_model.safetensors"))):
        answer_once_back(client, "iter-1")
        with pytest.raises(openai.NotFoundError, match=r"iter-0 cannot answer: .*digest") as refused:
            answer(client, "iter-0", PROMPTS[0])
    assert refused.value.code == "model_not_found"
    deadline = time.monotonic() + START_S
    for line in (f"iter-1: {ended}", f"iter-1: {unusable}", "iter-1: ready", "iter-0: an answer failed (/"):
        while line not in log.read_text():
            assert time.monotonic() < deadline, line
            time.sleep(0.5)
    answer(client, "iter-0", PROMPTS[0])
