"""The arena before a stand-in for the engines: canned answers, streamed word by word.

Also a program, for tests that need a server of its own: ``python arena_app.py DATABASE_URL PORT``.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.responses import Response

from spin_ray.serving import arena
from spin_ray.serving.names import Names
from spin_ray.serving.votes import VoteStore

ITERATES = ("sft", "iter-0", "iter-1")
SAYS = {
    "sft": "Certainly! As a helpful assistant, I would be delighted to provide you with a comprehensive overview of my"
    " day. It began, as days so often do, with a morning.\n\nIs there anything else I can help you with?",
    "iter-0": "pretty good, thanks! a bit tired, i was up late with a book. how about you?",
    "iter-1": "not bad :) went for a run before it got hot. you?",
}
EVIL = "<img src=x onerror=\"document.title='owned'\"> & <script>alert(1)</script>"
"""What the iterates say when they are asked for it: it must be shown as it is."""


def digest(iterate: str) -> str:
    return f"{ITERATES.index(iterate) + 1}" * 64


def make(votes: VoteStore, *, key: str | None = None, word_s: float = 0.0) -> FastAPI:
    """The application: with ``key``, every API route asks for it; a prompt with "fail" fails."""
    app = FastAPI()
    names = Names()
    names.serve_now(ITERATES, newest=ITERATES[-1])
    app.include_router(arena.router(votes, names))

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        if key and request.url.path.startswith("/v1") and request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse({"error": {"message": "Invalid API key."}}, 401)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'"
        return response

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in (*ITERATES, "latest")]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        prompt = body["messages"][-1]["content"]
        if "busy" in prompt:
            raise HTTPException(503, "Too many answers are being made.", {"Retry-After": "7"})
        iterate = names.resolve(body["model"])
        stream = says(EVIL if "evil" in prompt else SAYS[iterate], breaks="fail" in prompt, word_s=word_s)
        if names.is_alias(body["model"]):
            stream = arena.recorded(stream, votes, body["model"], body, digest(iterate))
        return StreamingResponse(stream, media_type="text/event-stream")

    return app


async def says(text: str, *, breaks: bool = False, word_s: float = 0.0) -> AsyncIterator[str]:
    """The events of a chat completion as vLLM writes them."""
    words = text.split(" ")
    for number, word in enumerate(words):
        yield event({"content": word if number == 0 else f" {word}"})
        await asyncio.sleep(word_s)
        if breaks and number == 3:
            return
    yield event({}, "stop")
    yield "data: [DONE]\n\n"


def event(delta: dict[str, str], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


if __name__ == "__main__":
    uvicorn.run(make(VoteStore(sys.argv[1])), port=int(sys.argv[2]), log_level="warning")
