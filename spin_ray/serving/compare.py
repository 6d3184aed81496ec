"""Comparison of iterates."""

import asyncio
import secrets
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import StageError, UserError
from spin_ray.run_dir.names import iterate_number
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.serving.bodies import ChatBody, CompareBody, GivenAnswer, plain
from spin_ray.serving.engines import CHAT, COMPLETION, TOKENS, Engines, whole
from spin_ray.serving.errors import Refusal

T = TypeVar("T")

NOTE = (
    "log-probabilities are the serving engines' own: sums over the answer's tokens in nats, at temperature 1; in bf16 "
    "they differ from the trainer's by about 0.05 a token"
)


async def compare(engines: Engines, body: CompareBody, config: SpinConfig, run: RunDir | None = None) -> dict[str, Any]:
    """Returns the answers of ``body.models``; with ``logprobs``, also log p of each answer under each model.

    ``run`` tells the β of iterates that are newer than this server. Without it that of ``config`` counts.

    Raises:
        UnknownModel: a model does not serve.
        Refusal: an engine refuses, or ``serving.request_timeout_s`` has passed.
    """
    iterates = [engines.names.resolve(model) for model in body.models]
    digests = [engines.digest(iterate) for iterate in iterates]  # now: engines may be replaced
    seed = body.seed if body.seed is not None else secrets.randbits(53)  # JavaScript and jq round larger numbers
    try:
        async with asyncio.timeout(config.serving.request_timeout_s):
            answers = await _all(
                (_given(engines, *each, body) for each in zip(iterates, body.answers, strict=True))
                if body.answers
                else (_sampled(engines, iterate, body, seed, config) for iterate in iterates)
            )
            if body.logprobs:
                await _score(engines, iterates, answers)
    except TimeoutError:
        raise Refusal(504, f"The comparison took longer than {config.serving.request_timeout_s:g} s") from None
    compared = [_shown(*each) for each in zip(body.models, iterates, digests, answers, strict=True)]
    result: dict[str, Any] = {"object": "comparison", "seed": seed, "answers": compared}
    if body.logprobs:
        now = await asyncio.to_thread(_recipe_now, run, config)
        result |= {"engine_margins": margins(iterates, answers, now), "note": NOTE}
    return result


def _recipe_now(run: RunDir | None, config: SpinConfig) -> SpinConfig:
    """Returns the run's recipe, which may have got further iterations; ``config`` if the run cannot be read here."""
    with suppress(UserError, StageError, OSError):
        return run.config() if run else config
    return config


def margins(iterates: list[str], answers: list[dict[str, Any]], config: SpinConfig) -> list[dict[str, Any]]:
    """Returns the SPIN margins of the newest iterate p against each other iterate q.

    A margin is beta · [log p(y)/q(y) − log p(y′)/q(y′)]: y is the answer of p (not a human response), y′ that of q.
    beta is that of the iteration that made p. With ``objective.length_normalised`` each log-ratio is divided by the
    tokens of its answer.
    """
    policy = max(range(len(iterates)), key=lambda index: iterate_number(iterates[index]))
    if iterates[policy] == "sft":
        return []
    beta = config.margin_beta(iterate_number(iterates[policy]) - 1)
    per_token = config.objective.length_normalised
    p, y = iterates[policy], answers[policy]

    def log_ratio(answer: dict[str, Any], q: str) -> float:
        tokens = max(1, len(answer["choices"][0]["token_ids"])) if per_token else 1
        return (answer["logps"][p] - answer["logps"][q]) / tokens

    return [
        {
            "policy": p,
            "opponent": q,
            "beta": beta,
            "length_normalised": per_token,
            "value": beta * (log_ratio(y, q) - log_ratio(own, q)),
        }
        for q, own in zip(iterates, answers, strict=True)
        if q != p
    ]


async def _all(asked: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns all results; after an error, or if it is cancelled, nothing goes on."""
    tasks = [asyncio.create_task(each) for each in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _given(engines: Engines, iterate: str, answer: GivenAnswer, body: CompareBody) -> dict[str, Any]:
    return await whole(engines, iterate, TOKENS, answer.model_dump() | {"messages": plain(body.messages)})


async def _sampled(engines: Engines, iterate: str, body: CompareBody, seed: int, config: SpinConfig) -> dict[str, Any]:
    sampling = body.model_dump(exclude={"models", "logprobs", "answers"}, exclude_none=True) | {"seed": seed}
    request = ChatBody.model_validate(sampling | {"model": iterate})
    fields = request.for_engine(iterate, config.serving.max_tokens) | {"return_token_ids": True}
    return await whole(engines, iterate, CHAT, fields)


async def _score(engines: Engines, iterates: list[str], answers: list[dict[str, Any]]) -> None:
    """Adds ``logps``, ``{iterate: log p}``, to each answer."""
    for answer in answers:
        logps = await _all(_logp(engines, iterate, answer) for iterate in iterates)
        answer["logps"] = dict(zip(iterates, logps, strict=True))


async def _logp(engines: Engines, iterate: str, answer: dict[str, Any]) -> float:
    prompt, response = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
    fields = {"model": iterate, "prompt": prompt + response, "max_tokens": 1, "prompt_logprobs": 0}
    scored = await whole(engines, iterate, COMPLETION, fields)
    positions = scored["choices"][0]["prompt_logprobs"][len(prompt) :]
    return sum(
        position[str(token)]["logprob"] if str(token) in position else position[token]["logprob"]
        for token, position in zip(response, positions, strict=True)
    )


def _shown(model: str, iterate: str, digest: str, answer: dict[str, Any]) -> dict[str, Any]:
    choice = answer["choices"][0]
    shown = {
        "model": model,
        "iterate": iterate,
        "digest": digest,
        "content": choice["message"].get("content") or "",
        "finish_reason": choice["finish_reason"],
        "usage": answer["usage"],
    }
    return shown | ({"logps": answer["logps"]} if "logps" in answer else {})
