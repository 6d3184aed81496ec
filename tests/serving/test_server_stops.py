"""SIGTERM to the server that the tests before this file shared; the name of this file puts it behind them."""

import json
import threading
from typing import Any

import httpx
import psutil
import pytest

from tests.support.served import ANSWER_S, Served

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_server_that_is_told_to_stop_ends_its_streams_first(served: Served) -> None:
    """The signal comes after the first piece of 200; every piece arrives; then nobody listens any more."""
    body: Any = {"model": "sft", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "stream": True}
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with httpx.stream(
            "POST", f"{served.url}/v1/chat/completions", json=body | {"n": 4}, timeout=ANSWER_S
        ) as response:
            for line in response.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(30)
    family = served.family()
    assert len(family) > 5, "Ray, replicas, engines"
    served.process.terminate()
    reader.join(90)
    assert lines and [line for line in lines if line][-1] == "data: [DONE]"
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    ends = [choice["finish_reason"] for event in events for choice in event["choices"] if choice.get("finish_reason")]
    assert len(ends) == 4
    assert served.process.wait(timeout=90) == 0
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{served.url}/healthz", timeout=5)
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert served.run.storage.exists("votes.sqlite") and not served.run.storage.exists("votes.sqlite-wal"), "not closed"
