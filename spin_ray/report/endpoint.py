"""Requests to an OpenAI-compatible server, with a cure for each failure."""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

from spin_ray.errors import ConfigError, StageError, first_line
from spin_ray.report.redaction import hide_in_text
from spin_ray.runtime.proxies import open_url, proxy_of

LOOK_S = 5.0
"""Longest wait for a sign of life, in seconds."""
_MOST_SAID = 300
_MOST_NAMES = 10
_FORM = "a base URL usually ends in /v1"
_CURES = {
    401: "set OPENAI_API_KEY to a key that this server knows",
    403: "set OPENAI_API_KEY to a key that may ask this model",
    404: f"is that the model's name there? {_FORM}",
    405: _FORM,
}


class Unanswered(Exception):
    """A request without a usable answer.

    Attributes:
        retry_s: seconds until a new try may succeed. None: the same request will fail again.
        is_silence: the server said nothing in time.
        kind: ConfigError if the same request will fail again, else StageError.
    """

    def __init__(self, reason: str, retry_s: float | None = None, *, is_silence: bool = False) -> None:
        super().__init__(hide_in_text(reason))
        self.retry_s, self.is_silence = retry_s, is_silence
        self.kind: type[ConfigError | StageError] = ConfigError if retry_s is None else StageError


def unreachable(endpoint: str, timeout_s: float = LOOK_S) -> str | None:
    """Returns why no server answers at a base URL such as ``http://HOST:8000/v1``; None if one answers, even by a
    refusal.
    """
    try:
        open_url(_request(f"{endpoint.rstrip('/')}/models"), timeout_s).close()
    except urllib.error.HTTPError as refusal:
        refusal.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = f"{_said(error)}{_through(endpoint)}"
        return f"nothing answers there: {reason}; is the server running, and is this its address?"
    return None


def ask(endpoint: str, route: str, body: Mapping[str, Any], timeout_s: float) -> Any:
    """Returns the JSON answer of ``POST endpoint/route``.

    Raises:
        Unanswered: there is none.
    """
    request = _request(f"{endpoint.rstrip('/')}/{route}", json.dumps(body).encode())
    try:
        with open_url(request, timeout_s) as answer:
            text = answer.read()
    except urllib.error.HTTPError as refusal:
        with refusal:
            raise _refused(refusal, endpoint) from refusal
    except TimeoutError as error:
        raise Unanswered(
            f"no answer within {timeout_s:g} s{_through(endpoint)}; is the model loaded?", 0, is_silence=True
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unanswered(f"the connection failed: {_said(error)}{_through(endpoint)}", 0) from error
    try:
        return json.loads(text)
    except ValueError as error:
        raise Unanswered(f"an answer that is not JSON ({_start(text)}){_through(endpoint)}; {_FORM}") from error


def _refused(refusal: urllib.error.HTTPError, endpoint: str) -> Unanswered:
    reason = f"HTTP {refusal.code}: {_words(refusal)}{_through(endpoint)}"
    if refusal.code == 429 or refusal.code >= 500:
        retry_s = _retry_after(refusal.headers.get("Retry-After"))
        asked = f"; it asks to wait {retry_s:.0f} s" if retry_s else ""
        return Unanswered(f"{reason}{asked}; run the command again later, or ask less at once", retry_s)
    if refusal.code == 404 and (names := _models(endpoint)):
        reason += f"; the server has {', '.join(names)}"
    return Unanswered("; ".join([reason, *([_CURES[refusal.code]] if refusal.code in _CURES else [])]))


def _words(refusal: urllib.error.HTTPError) -> str:
    """Returns the message of an OpenAI-style error, or the start of the body."""
    try:
        text = refusal.read()
    except (OSError, http.client.HTTPException):
        return refusal.reason
    try:
        found = json.loads(text)
        error = found.get("error", found.get("detail", found))
        said = str(error.get("message", error) if isinstance(error, dict) else error)
        return " ".join(said[:_MOST_SAID].split())
    except (ValueError, AttributeError):
        return f"{refusal.reason} {_start(text)}"


def _start(text: bytes) -> str:
    return repr(" ".join(text[:_MOST_SAID].decode("utf-8", "replace").split())[:80])


def card_of(endpoint: str, model: str) -> dict[str, Any]:
    """Returns what the server says of a model; empty if it says nothing."""
    card = _get(endpoint, f"models/{model}")
    return card if isinstance(card, dict) else {}


def _models(endpoint: str) -> list[str]:
    try:
        names = [str(model["id"]) for model in _get(endpoint, "models")["data"]]
    except (LookupError, TypeError):
        return []
    return names[:_MOST_NAMES] + (["…"] if len(names) > _MOST_NAMES else [])


def _get(endpoint: str, route: str) -> Any:
    """Returns the JSON answer; None if there is none within ``LOOK_S``."""
    try:
        with open_url(_request(f"{endpoint.rstrip('/')}/{route}"), LOOK_S) as answer:
            return json.load(answer)
    except (OSError, ValueError, http.client.HTTPException):
        return None


def _retry_after(header: str | None) -> float:
    """Returns the seconds of a ``Retry-After``, a number or a date; 0 if unreadable."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(str(header)).timestamp() - time())
    except ValueError:
        return 0.0


def _request(url: str, body: bytes | None = None) -> urllib.request.Request:
    key = os.environ.get("OPENAI_API_KEY", "none").strip()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    return urllib.request.Request(url, body, headers)


def _through(endpoint: str) -> str:
    """Returns a remark on the proxy of the environment; empty without one."""
    proxy = proxy_of(endpoint)
    return f" (asked through the proxy {proxy}; NO_PROXY leaves it out)" if proxy else ""


def _said(error: BaseException) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return first_line(reason) if isinstance(reason, BaseException) else str(reason)
