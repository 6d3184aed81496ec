"""Errors in OpenAI's form."""

import random
import re
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


_WORDS = {
    "missing": "is missing", "json_invalid": "is not JSON ({error})", "finite_number": "must be a finite number",
    "greater_than": "must be more than {gt}", "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}", "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}", "string_pattern_mismatch": "must match {pattern}",
    "too_short": "has {actual_length}; at least {min_length} must be given",
    "too_long": "has {actual_length}; at most {max_length} are allowed",
    "string_too_long": "has more than {max_length} characters", "empty": "must not be empty",
    "string_unicode": "is not valid Unicode (a lone surrogate)",
    "string_type": "must be a text", "bool_type": "must be true or false", "list_type": "must be a list",
    "int_type": "must be a whole number", "int_from_float": "must be a whole number", "float_type": "must be a number",
    "model_type": "must be an object", "model_attributes_type": "must be an object",
}  # fmt: skip
"""Messages by pydantic's type of error; pydantic's own speak of Python's types."""
_NAMED = ("stream_options", "top_logprobs", "max_tokens")
"""Error types about several fields; their messages begin with the field's name."""


_SPREAD_S = 2
"""Most seconds by chance that a 503 adds to ``Retry-After``."""


class Refusal(Exception):
    """An error with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_s = status, message, code, param, retry_s

    def response(self) -> JSONResponse:
        headers = {} if self.retry_s is None else {"Retry-After": str(self._wait_s(self.retry_s))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.content(), self.status, headers)

    def _wait_s(self, least: int) -> int:
        """Spreads clients that are refused together, so that they do not all come back together."""
        return least + (random.randint(0, _SPREAD_S) if self.status == 503 else 0)

    def content(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {key: _printable(value) for key, value in error.items()}}

    @property
    def kind(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error")


def no_answer() -> Refusal:
    return Refusal(500, "the engine ended without an answer")


def engine_failed(*, code: str | None = None, param: str | None = None) -> Refusal:
    return Refusal(500, "the engine failed; the request may be repeated", code=code, param=param)


def too_slow(limit_s: float) -> Refusal:
    return Refusal(504, f"The answer took longer than {limit_s:g} s")


def own_error() -> Refusal:
    """Returns the refusal for an exception that nobody expected."""
    return Refusal(500, "an error here, not in the request; the server's log has more")


def _printable(text: str | None) -> str | None:
    """Replaces lone surrogates, which UTF-8 cannot hold."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def from_engine(error: dict[str, Any]) -> Refusal:
    """Keeps an engine's 4xx and the 503 of a dead one; makes every other error a 500.

    ``code`` is the HTTP status, as in vLLM, and ``name`` OpenAI's code.
    """
    code = error.get("code")
    if code == 503:
        return Refusal(503, error["message"], code="engine_down", retry_s=error.get("retry_s", 1))
    name, param = error.get("name"), error.get("param")
    if isinstance(code, int) and 400 <= code < 500:
        return Refusal(code, str(error.get("message", "")), code=name, param=param)
    return engine_failed(code=name, param=param)


def from_validation(errors: Any) -> Refusal:
    """Returns pydantic's first problem, with the field's name in the body."""
    field = errors[0]["loc"][:2]
    # Prefers an error about a limit to one about a type: a field may have several types.
    first = min((it for it in errors if it["loc"][:2] == field), key=lambda it: it["type"].endswith("_type"))
    where = _where(first)
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"{where}: is not supported here", code="unsupported_parameter", param=where)
    if not where and first["type"] in _NAMED:
        return Refusal(400, first["msg"], param=first["type"])
    told = _in_words(first)
    if first["type"].endswith("_type"):
        forms = dict.fromkeys(_in_words(it).removeprefix("must be ") for it in errors if _where(it) == where)
        if where and any(_where(it).startswith(f"{where}.") for it in errors):
            forms["a list whose items are alike"] = None
        told = f"must be {' or '.join(forms)}"
    return Refusal(400, f"{where or 'body'}: {told}", param=where or None)


def _where(error: Any) -> str:
    if error["type"] == "json_invalid":  # its ``loc`` is a position in the text
        return ""
    path = list(error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"])
    unknown = [path.pop()] if error["type"] == "extra_forbidden" else []  # by whatever name the client gave it
    return ".".join(str(part) for part in [*filter(_is_field, path), *unknown])


def _in_words(error: Any) -> str:
    context = error.get("ctx", {})
    is_empty = context.get("actual_length") == 0 or context.get("min_length") == 1
    kind = "empty" if is_empty else error["type"]
    return _WORDS[kind].format(**context) if kind in _WORDS else error["msg"]


def _is_field(part: str | int) -> bool:
    """Tells whether ``part`` is a field's name or an index; the names of a union's members are neither."""
    return isinstance(part, int) or (re.fullmatch(r"[a-z_]+", part) is not None and part not in ("str", "int"))
