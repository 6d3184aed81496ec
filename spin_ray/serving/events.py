"""Server-sent events of a streamed answer."""

import json
from collections.abc import Callable
from typing import Any

DONE = "[DONE]"


def rewrite(events: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """Applies ``change`` to the object of each of the whole ``events``."""
    told = [event.removeprefix("data: ").strip() for event in events.split("\n\n") if event.strip()]
    changed = [data if data == DONE else json.dumps(change(json.loads(data))) for data in told]
    return "".join(f"data: {data}\n\n" for data in changed)
