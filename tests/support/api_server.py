"""The HTTP layer in this process, over engines without a model."""

import asyncio
from typing import Any

import httpx

from spin_ray.serving.access import Key
from spin_ray.serving.api import make_app
from tests.support.fake_engines import FakeEngines, empty_votes
from tests.support.tiny_runs import tiny_config

CHAT, COMPLETIONS, COMPARE = "/v1/chat/completions", "/v1/completions", "/v1/compare"
JSON = {"Content-Type": "application/json"}
HELLO = {"model": "sft", "messages": [{"role": "user", "content": "hello"}]}


class Server:
    def __init__(self, keys: list[Key] | None = None, **serving: Any) -> None:
        self.engines = FakeEngines()
        self.app = make_app(self.engines, tiny_config(**serving), keys or [], empty_votes())
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def post(self, path: str, content: Any, **headers: str) -> httpx.Response:
        return await self.client.post(path, json=content, headers=headers)


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """Returns the error, after checking that it has OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error
