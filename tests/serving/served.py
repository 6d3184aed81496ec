"""A server as its client sees it."""

import time
from dataclasses import dataclass

import httpx
import openai

from spin_ray.run_dir import RunDir

START_S = 420


@dataclass(frozen=True)
class Served:
    run: RunDir
    url: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def card(self, name: str) -> dict[str, str]:
        return httpx.get(f"{self.url}/v1/models/{name}", timeout=30).raise_for_status().json()

    def wait_until_serves(self, name: str, iterate: str) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                if self.card(name)["iterate"] == iterate:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"{name} was not {iterate} within {START_S} s")
