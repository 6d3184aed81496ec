"""The first look at a server that others are about to ask."""

import urllib.error
import urllib.request

from spin_ray.errors import first_line

LOOK_S = 5.0
"""Longest wait for a sign of life, in seconds."""


def unreachable(endpoint: str, timeout_s: float = LOOK_S) -> str | None:
    """Returns why no server answers at a base URL such as ``http://HOST:8000/v1``; None: one does, be it a refusal."""
    try:
        urllib.request.urlopen(f"{endpoint.rstrip('/')}/models", timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"nothing answers there: {first_line(error)}"
    return None
