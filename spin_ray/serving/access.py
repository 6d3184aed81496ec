"""API keys and rate limits. Keys are random, so a plain hash is as safe as a slow one."""

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spin_ray.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LINE = re.compile(
    r"(?P<name>[\w.@-]{1,64})\s+(?P<sha256>[0-9a-f]{64})(?:\s+(?P<rate>[1-9]\d{0,8}))?(?:\s+(?P<export>export))?"
)


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    sha256: str
    per_minute: int | None
    """None: ``serving.requests_per_minute`` holds."""
    may_export: bool = False
    """Permission to read the arena's votes, with everybody's conversations."""


def read_keys(file: str | Path) -> list[Key]:
    """Reads the keys of a file.

    Raises:
        ConfigError: the file cannot be read, is open to others, or has a wrong line or no key.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
        mode = Path(file).stat().st_mode & 0o777
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"serving.keys {file}: cannot be read ({error})") from error
    if mode & 0o007:
        raise ConfigError(f"serving.keys {file}: others on this machine can read or change it ({mode:o}); chmod 600 it")
    keys = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if not match:
            raise ConfigError(
                f"{file}:{number}: is not NAME SHA256 [REQUESTS_PER_MINUTE] [export]; "
                "`spin-ray serve-key NAME` makes one"
            )
        rate = int(match["rate"]) if match["rate"] else None
        keys.append(Key(match["name"], match["sha256"], rate, may_export=bool(match["export"])))
    if not keys:
        raise ConfigError(f"serving.keys {file}: holds no key; `spin-ray serve-key NAME` makes one")
    return keys


def new_key(name: str, per_minute: int | None = None, *, may_export: bool = False) -> tuple[str, str]:
    """Returns a fresh key and its line for the key file.

    Raises:
        ConfigError: a server would not read the line.
    """
    key = f"sr-{secrets.token_urlsafe(32)}"
    words = [name, _sha256(key.encode()), str(per_minute or ""), "export" if may_export else ""]
    line = " ".join(filter(None, words))
    if not _LINE.fullmatch(line):
        raise ConfigError(f"{name!r}: is no name of a key; use up to 64 letters, digits, '.', '@', '_' and '-'")
    return key, line


def find_key(keys: list[Key], authorization: bytes | None) -> Key | None:
    """Finds the key of an ``Authorization: Bearer KEY`` header, in constant time."""
    scheme, _, given = (authorization or b"").partition(b" ")
    digest = _sha256(given.strip()) if scheme.lower() == b"bearer" else ""
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def guard_ray_token(embedded: bool) -> None:
    """Makes Ray's token file readable by its owner only, unlike Ray; creates a missing one if Ray is ``embedded``.

    Raises:
        ConfigError: the file cannot be created or changed.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    file = Path.home() / ".ray" / "auth_token"
    try:
        if file.exists():
            file.chmod(0o600)
        elif embedded:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as token:
                token.write(secrets.token_hex(32))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be kept from others ({error.strerror}); set RAY_AUTH_TOKEN") from error


class Rates:
    """Token buckets, one for each name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait_s(self, name: str, per_minute: int) -> float:
        """Counts a request and returns 0, or returns the seconds until ``name`` may ask again."""
        now = self._clock()
        tokens, then = self._buckets.get(name, (float(per_minute), now))
        tokens = min(float(per_minute), tokens + (now - then) * per_minute / 60)
        if tokens < 1:
            self._buckets[name] = (tokens, now)
            return (1 - tokens) * 60 / per_minute
        self._buckets[name] = (tokens - 1, now)
        return 0.0


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
