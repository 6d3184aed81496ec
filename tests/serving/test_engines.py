"""Engines of Ray Serve that die, over handles that are not Ray's."""

import asyncio
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from spin_ray.errors import RunDirError
from spin_ray.inputs.rendering import ChatRenderer, RenderError, load_tokenizer
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.serving.engines import CHAT, COMPLETION, TOKENS, ServeEngines, whole
from spin_ray.serving.errors import Refusal, from_engine
from spin_ray.serving.iterate_engine import IterateEngine, _Completion
from spin_ray.serving.poison import POISON_S, PoisonList
from tests.support.tiny_runs import make_run

DEADLY, HARMLESS = {"messages": ["deadly"]}, {"messages": ["hello"]}


class Handle:
    """A handle whose engine dies of ``DEADLY``, in words or without, and with it all that waits for ``gate``."""

    def __init__(self, without_words: bool) -> None:
        self.answer, self._without_words, self.asked = self, without_words, 0
        self.gate, self._died = asyncio.Event(), asyncio.Event()
        self.gate.set()

    def remote(self, operation: str, fields: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async def items() -> AsyncIterator[dict[str, Any]]:
            self.asked += 1
            died = self._died
            if fields["messages"] == DEADLY["messages"]:
                self._died = asyncio.Event()  # of the next engine
                died.set()
            await asyncio.wait(
                [asyncio.create_task(event.wait()) for event in (self.gate, died)],
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not died.is_set():
                yield {"choices": []}
            elif self._without_words:
                raise RayActorError
            else:
                yield {"error": {"code": 503, "message": "the engine ended"}}

        return items()


TABLE: dict[str, Any] = {
    "keeper": "first", "version": 7, "newest": "iter-0", "problems": {}, "down": [], "running": ["sft", "iter-0"],
    "troubles": {}, "settled": True, "starting": {},
    "engines": {name: {"app": name, "digest": "d"} for name in ("sft", "iter-0")},
}  # fmt: skip
ADAPTERS = TABLE | {"engines": {name: {"app": "sft", "digest": "d"} for name in ("sft", "iter-0")}}
"""A table whose iterates share an engine."""


def engines(handle: Any, *, sees_all: bool = True, table: dict[str, Any] = TABLE) -> ServeEngines:
    made = ServeEngines(None, sees_all=sees_all)
    made._handles = {"sft": handle, "iter-0": handle}
    made._take(table)
    return made


class Call:
    """A call as Ray Serve's: it goes on when nobody awaits it any more, until it is cancelled."""

    def __init__(self, task: asyncio.Task[dict[str, Any]]) -> None:
        self._task = task

    def __await__(self) -> Generator[Any, None, dict[str, Any]]:
        return asyncio.shield(self._task).__await__()

    def cancel(self) -> None:
        self._task.cancel()


class Tables:
    """A keeper that gives one table after another, then no more."""

    def __init__(self, *tables: dict[str, Any] | Exception) -> None:
        self.table, self._tables = self, list(tables)
        self.calls = list[Call]()
        self.are_read = asyncio.Event()

    def remote(self, version: int, wait_s: float) -> Call:
        self.calls.append(Call(asyncio.create_task(self._next())))
        return self.calls[-1]

    async def _next(self) -> dict[str, Any]:
        if not self._tables:
            self.are_read.set()
            await asyncio.sleep(60)
        table = self._tables.pop(0)
        if isinstance(table, Exception):
            raise table
        return table


async def followed(made: ServeEngines) -> None:
    """Follows the keeper until all of its tables are read."""
    following = asyncio.create_task(made.follow())
    await asyncio.wait_for(made._keeper.are_read.wait(), 60)
    following.cancel()
    await asyncio.wait([following])
    await asyncio.sleep(0)


@pytest.mark.parametrize("died", [[], [RayActorError()]])
def test_a_restarted_keeper_makes_no_known_model_unknown(died: list[Exception]) -> None:
    """Until it has looked after each; one whose engine does not run is down, one that is not wanted any more goes."""
    empty = TABLE | {"keeper": "second", "newest": None, "engines": {}, "settled": False}
    sft = {"sft": TABLE["engines"]["sft"]}

    async def after(*tables: dict[str, Any] | Exception) -> ServeEngines:
        made = engines(Handle(False))
        made._keeper = Tables(TABLE, *tables)
        await followed(made)
        return made

    async def check() -> None:
        made = await after(*died, empty)
        assert made.names.resolve("latest") == "iter-0" and made.names.iterates == ("sft", "iter-0")
        assert not made.down
        assert not (await after(*died, empty | {"running": None})).down
        assert (await after(*died, empty | {"running": []})).down == {"sft", "iter-0"}
        adopted = await after(*died, empty, empty | {"version": 2, "running": [], "engines": sft})
        assert adopted.names.iterates == ("sft", "iter-0") and adopted.down == {"iter-0"}
        settled = await after(*died, empty, empty | {"version": 3, "engines": sft, "settled": True})
        assert settled.names.iterates == ("sft",)

    asyncio.run(check())


def test_who_follows_the_keeper_no_more_leaves_no_call_to_it() -> None:
    """The keeper's own end would wait for the call's."""

    async def check() -> None:
        made, before = engines(Handle(False)), asyncio.all_tasks()
        made._keeper = Tables(TABLE)
        await followed(made)
        assert len(made._keeper.calls) == 2 and asyncio.all_tasks() == before

    asyncio.run(check())


async def refusal(made: ServeEngines, iterate: str, fields: dict[str, Any]) -> tuple[int, str | None]:
    with pytest.raises(Refusal) as refused:
        await whole(made, iterate, CHAT, fields)
    return refused.value.status, refused.value.code


@pytest.mark.parametrize("without_words", [False, True])
def test_a_request_that_was_alone_when_its_engine_ended_is_refused_by_every_model(without_words: bool) -> None:
    async def check() -> None:
        handle = Handle(without_words)
        made = engines(handle)
        with pytest.raises(Refusal) as died:
            await whole(made, "sft", CHAT, DEADLY | {"model": "sft"})
        assert (died.value.status, died.value.code) == (503, "engine_down") and died.value.retry_s
        assert made.down == {"sft"}
        assert await refusal(made, "iter-0", DEADLY | {"model": "iter-0", "stream": True}) == (400, "poisoned")
        with pytest.raises(Refusal) as down:  # it does not wait for the engine
            await whole(made, "sft", CHAT, HARMLESS)
        assert (down.value.status, down.value.retry_s) == (503, 5)
        assert await whole(made, "iter-0", CHAT, HARMLESS) == {"choices": []}
        assert handle.asked == 2

    asyncio.run(check())


@pytest.mark.parametrize("sees_all", [False, True])
def test_of_fifty_requests_at_one_death_none_is_refused_and_the_one_of_two_deaths_is(
    sees_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model dies of the same request, which its client repeats at once. One innocent request meets both deaths."""
    monkeypatch.setattr("spin_ray.serving.engines._SUSPECT_S", 0)  # the engine is back at once

    async def check() -> None:
        handle = Handle(without_words=False)
        made = engines(handle, sees_all=sees_all)
        handle.gate.clear()
        innocent = [{"messages": [f"{number}"]} for number in range(49)]

        async def die(*others: dict[str, Any]) -> None:
            waiting = [asyncio.create_task(refusal(made, "sft", fields)) for fields in others]
            while handle.asked < len(others):
                await asyncio.sleep(0)
            handle.asked = 0
            assert await refusal(made, "sft", DEADLY) == (503, "engine_down")
            assert await asyncio.gather(*waiting) == [(503, "engine_down")] * len(others)
            handle.asked = 0

        await die(*innocent, innocent[0])
        await die(innocent[0])
        for fields in (DEADLY, innocent[0]):
            assert await refusal(made, "iter-0", fields) == (400, "poisoned")
        handle.gate.set()
        for fields in innocent[1:]:
            assert await whole(made, "sft", CHAT, fields) == {"choices": []}

    asyncio.run(asyncio.wait_for(check(), 20))


def test_an_engine_that_ended_is_down_for_all_iterates_that_share_it() -> None:
    """Else the next request to it would seem to meet a second death."""

    async def check() -> None:
        made = engines(Handle(without_words=True), table=ADAPTERS)
        assert await refusal(made, "sft", DEADLY) == (503, "engine_down")
        assert made.down == {"sft", "iter-0"}
        assert await refusal(made, "iter-0", HARMLESS) == (503, "engine_down")

    asyncio.run(check())


class Failing:
    """A handle whose engine fails, and a keeper that hears of it."""

    def __init__(self, failure: Exception | dict[str, Any]) -> None:
        self.answer, self._failure = self, failure
        self.heard = list[tuple[str, str]]()
        self.note_failure = SimpleNamespace(remote=lambda *told: self.heard.append(told))

    async def remote(self, operation: str, fields: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        if isinstance(self._failure, Exception):
            raise self._failure
        yield {"error": self._failure}

    async def refusal(self) -> Refusal:
        made = engines(self)
        made._keeper = self
        for _ in range(2):
            with pytest.raises(Refusal) as refused:
                await whole(made, "iter-0", CHAT, HARMLESS)
        return refused.value


NO_KERNEL = "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device"


@pytest.mark.parametrize(
    "failure",
    [
        RayTaskError("answer", f"Traceback (most recent call last):\n  File x\n{NO_KERNEL}", RuntimeError()),
        {"code": 500, "message": NO_KERNEL},
    ],
)
def test_an_answer_that_fails_may_be_repeated_and_the_keeper_hears_once_why(failure: Any) -> None:
    failing = Failing(failure)
    refusal = asyncio.run(failing.refusal())
    assert (refusal.status, refusal.message) == (500, "the engine failed; the request may be repeated")
    assert failing.heard == [("iter-0", NO_KERNEL)]


def test_a_refusal_that_is_about_the_request_is_no_failure() -> None:
    failing = Failing({"code": 400, "message": "prompt: is too long"})
    assert asyncio.run(failing.refusal()).status == 400 and failing.heard == []


def test_an_adapter_that_cannot_be_loaded_is_no_failure_that_a_repetition_gets_past() -> None:
    told = "/r/iter_000/adapter: is no adapter of the model that this engine holds"
    failing = Failing(RayTaskError("answer", "a traceback", RunDirError(told)))
    refusal = asyncio.run(failing.refusal())
    assert (refusal.status, refusal.code) == (404, "model_not_found")
    assert refusal.message == f"iter-0 cannot answer: {told}"
    assert failing.heard == [("iter-0", told)]


class Ticks:
    """A clock on which each look takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_a_request_is_poison_at_its_second_death_within_the_window_or_if_it_was_alone() -> None:
    clock = Ticks()
    several = PoisonList(sees_all=True, clock=clock)
    with several.serving("a", "x") as first, several.serving("a", "x") as twin, several.serving("a", "y") as other:
        assert not any([several.note_death(request) for request in (first, twin, other)]), "of one death"
    with several.serving("b", "x") as again, several.serving("b", "z") as new:
        assert several.note_death(again) and not several.note_death(new)
    assert several.wait_s("x") == POISON_S - 2, "two looks later"
    assert several.wait_s("y") == several.wait_s("z") == 0
    clock.now += POISON_S
    assert several.wait_s("x") == 0
    with several.serving("b", "x") as late, several.serving("b", "z"):
        assert not several.note_death(late), "the first two are forgotten"
    with several.serving("a", "y"), several.serving("c", "w") as alone:
        assert several.note_death(alone), "at its engine"
    with several.serving("a", "y") as left, several.serving("a", "v") as right:
        several.note_death(left)
    assert not several.note_death(right), "it is the last of a death, not the only one"


def test_a_process_beside_others_does_not_know_which_request_was_alone() -> None:
    some = PoisonList(sees_all=False, clock=Ticks())
    with some.serving("a", "x") as first:
        assert not some.note_death(first)
    with some.serving("a", "x") as second:
        assert some.note_death(second)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("engine") / "run", iterates=0)


def engine(run: RunDir, vocabulary: int) -> IterateEngine:
    """Returns an engine without vLLM, whose model has ``vocabulary`` rows in its embedding."""
    made = IterateEngine.__new__(IterateEngine)
    made._config, made._vocabulary = run.config(), vocabulary
    made._tokenizer = load_tokenizer(str(Path(run.description()["start_model"])))
    made._renderer = ChatRenderer(made._tokenizer)
    return made


def test_ids_without_a_row_in_the_embedding_never_reach_the_engine(run: RunDir) -> None:
    """The tokenizer knows ids that a model of 40 rows does not embed: in a prompt of ids, of text, and in a chat."""
    made = engine(run, 40)
    for prompt in ([40], [[1], [2, 2**31 - 1]], "hello world", ["hello world"]):
        with pytest.raises(RenderError, match=r"prompt: token id .* is not in the model's vocabulary.* 0 to 39"):
            made._check_prompts(prompt)
    with pytest.raises(RenderError, match="answers: token id"):
        made._as_sampled([{"role": "user", "content": "hello"}], "world", "stop")


def test_a_prompt_must_leave_room_for_one_token(run: RunDir) -> None:
    made = engine(run, 10**6)
    assert run.config().model.max_length == 256
    made._check_prompts([[1] * 255, [1]])
    for wrong in ([1] * 256, ""):
        with pytest.raises(RenderError, match="there must be 1 to 255"):
            made._check_prompts(wrong)


@pytest.mark.parametrize(
    ("operation", "fields", "param", "code"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "word " * 300}]}, "messages", "context_length_exceeded"),
        (COMPLETION, {"prompt": "word " * 300}, "prompt", "context_length_exceeded"),
        (COMPLETION, {"prompt": [[1], [1] * 256]}, "prompt", "context_length_exceeded"),
        (COMPLETION, {"prompt": ""}, "prompt", None),
        (COMPLETION, {"prompt": [10**6]}, "prompt", None),
        (
            TOKENS,
            {"messages": [{"role": "user", "content": "a"}], "content": "word " * 300, "finish_reason": "stop"},
            "answers", "context_length_exceeded",
        ),
    ],
)  # fmt: skip
def test_a_prompt_that_is_too_long_has_openais_code_by_which_clients_shorten_it(
    run: RunDir, operation: str, fields: dict[str, Any], param: str, code: str | None
) -> None:
    async def refused() -> Refusal:
        made = engine(run, 10**6)
        made._client, made._iterate, made._stops = SimpleNamespace(errored=False), SimpleNamespace(name="sft"), []
        (item,) = [item async for item in made.answer(operation, fields)]
        return from_engine(item["error"])

    refusal = asyncio.run(refused())
    assert (refusal.status, refusal.param, refusal.code) == (400, param, code)
    assert refusal.message.startswith(f"{param}: ")


def test_vllm_is_asked_for_a_token_more_than_the_client_asks_for(run: RunDir) -> None:
    """It counts the sampled token among them."""
    made, asked = engine(run, 10**6), {"model": "sft", "messages": [{"role": "user", "content": "hello"}]}
    made._stops = []
    assert made._rendered(asked | {"logprobs": True, "top_logprobs": 20}).top_logprobs == 21
    assert made._rendered(asked | {"logprobs": True}).top_logprobs == 0


def test_vllm_checks_the_prompts_of_a_completion_without_its_max_tokens() -> None:
    """vLLM lowers ``max_tokens`` for each prompt by itself, but would refuse prompts beside which it does not fit."""
    asked = _Completion(model="sft", prompt=[[5] * 250, [5] * 3], max_tokens=1000)
    assert asked.build_tok_params(SimpleNamespace(max_model_len=256)).max_input_tokens == 256
    assert asked.max_tokens == 1000


def test_a_trailing_answer_is_continued_where_it_ends(run: RunDir) -> None:
    made = engine(run, 10**6)
    asked = [{"role": "user", "content": "hello"}]
    begun = made._prompt_ids([*asked, {"role": "assistant", "content": "I am"}])
    prompt = made._prompt_ids(asked)
    assert begun[: len(prompt)] == prompt
    assert made._tokenizer.decode(begun[len(prompt) :]) == "I am"
