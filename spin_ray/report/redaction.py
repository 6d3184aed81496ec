"""Removal of credentials from reports, model cards and trackers."""

import re
from pathlib import PurePosixPath
from typing import Any

HIDDEN = "[hidden]"

_NAMES = re.compile(r"(?i)(passw|secret|credential|api_?key|access_?key|private_?key|auth|bearer|(^|_)token$)")
"""Settings whose text is hidden: ``hf_token``, not ``max_tokens`` or ``tokenizer``."""
_VALUES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
)
"""Tokens of well-known services."""
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+@")
_QUERY_OF_URL = re.compile(
    r"(?i)([?&](?:x-amz-[\w-]+|sig|signature|token|key|secret|password|access_token)=)[^&\s\"']+"
)
_ASSIGNED = re.compile(r"(?i)\b((?:[\w-]*(?:password|secret|token|api[_-]?key))\s*[=:]\s*)(?!\d+\b)[^\s,;\"'}\]]{6,}")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}")


def hide_in_text(text: str) -> str:
    """Hides what looks like a credential."""
    text = _USER_OF_URL.sub(f"{HIDDEN}@", text)
    text = _QUERY_OF_URL.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    text = _ASSIGNED.sub(rf"\1{HIDDEN}", text)
    return _VALUES.sub(HIDDEN, text)


def without_folders(text: str) -> str:
    """Returns the last name of a local path that says where it lies; any other text stays."""
    path = PurePosixPath(text)
    says = text.startswith(("/", "~/", "./", "../")) and "\n" not in text and len(path.parts) > 1
    return path.name if says and (len(path.parts) > 2 or not path.is_absolute()) else text


def hide_folders(tree: Any) -> Any:
    """Returns a copy of a recipe in which local paths are names alone."""
    if isinstance(tree, dict):
        return {key: value if key in _NO_PATHS else hide_folders(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [hide_folders(value) for value in tree]
    return without_folders(tree) if isinstance(tree, str) else tree


_NO_PATHS = ("system", "chat_template_kwargs")
"""Settings that are texts for the model."""


def hide(tree: Any, name: str = "") -> Any:
    """Returns a copy with credentials hidden by name or look."""
    if isinstance(tree, dict):
        return {key: hide(value, str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [hide(value, name) for value in tree]
    if isinstance(tree, str):
        return HIDDEN if tree and _NAMES.search(name) else hide_in_text(tree)
    return tree
