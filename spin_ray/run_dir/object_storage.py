"""A run on an object store (``s3://``, ``gs://``), which has no renames and no locks.

Commits and lines of logs are conditional puts. LATEST is a plain put after a check of the lease.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import ObjectStore, from_url

from spin_ray.errors import ConfigError, RunDirError, StageError, first_line
from spin_ray.run_dir.cache import cache_root, folder_with, new_attempt
from spin_ray.run_dir.google import ACCOUNT, share_google_account
from spin_ray.run_dir.storage import MANIFEST, UPDATE_TIMEOUT_S, Digest, Storage

CACHE = cache_root() / "runs"
logger = logging.getLogger(__name__)
T = TypeVar("T")

DEADLINE_S = 180.0
"""Seconds after a call's first failure in which it is tried again."""
LEAST_TRIES = 4
"""Tries of a call that alone takes longer than ``DEADLINE_S``, such as the upload of a large file."""
FIRST_DEADLINE_S = 5.0
"""Longest search for credentials before the store's first answer."""
FIRST_ANSWER_S = 30.0
"""Longest wait for a store's first answer, in seconds: it may not run, or have another address."""
_REQUEST_S = 60.0
_SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_SAID = re.compile(r'\b(?:message|error): "([^"]+)"')
_METADATA = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
"""Servers that give a machine's role its credentials, asked if the environment names none."""
_CREDENTIALS = (
    "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_REGION, AWS_ENDPOINT_URL), or "
    "GOOGLE_APPLICATION_CREDENTIALS, in the environment of driver and nodes, or a role to the machines (profiles of "
    "~/.aws are not read)"
)


class ObjectStorage(Storage):
    """``Storage`` on an object store; credentials and endpoint come from ``AWS_…`` or ``GOOGLE_…`` variables."""

    def __init__(self, root: str, token: str | None = None, *, has_answered: bool = False) -> None:
        self.root = self._uri = root.rstrip("/")
        self._token = token
        self._has_answered = has_answered
        share_google_account()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self._uri, self._token, self._has_answered)  # each process opens its own connections

    def fenced(self, token: str) -> "ObjectStorage":
        return ObjectStorage(self._uri, token, has_answered=self._has_answered)

    def refuse_missing(self) -> None:
        def list_some() -> None:
            try:
                next(iter(obstore.list(self._store, chunk_size=1)), None)
            except BaseError as error:
                if "404 Not Found" not in str(error):
                    raise
                raise FileNotFoundError from error  # of lists obstore tells the status alone

        try:
            self._insist("", list_some)
        except FileNotFoundError as error:
            raise self._no_bucket() from error

    def path(self, name: str) -> Path:
        raise ConfigError(f"{self.where(name)}: needs a local or shared folder; leave it out, or copy the run first")

    def where(self, name: str) -> str:
        return f"{self._uri}/{name}"

    def entries(self, folder: str = "") -> list[str]:
        listed = self._insist(folder, lambda: obstore.list_with_delimiter(self._store, folder or None))
        paths = [*map(str, listed["common_prefixes"]), *(one["path"] for one in listed["objects"])]
        return sorted(path.rpartition("/")[2] for path in paths)

    def exists(self, name: str) -> bool:
        try:
            self._insist(name, lambda: obstore.head(self._store, name))
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        return self._insist(name, lambda: bytes(obstore.get(self._store, name).bytes()))

    def create(self, name: str, data: bytes) -> None:
        def put() -> None:
            with self._held():
                try:
                    obstore.put(self._store, name, data, mode="create")
                except AlreadyExistsError:
                    # The same bytes are from this put, whose reply was lost.
                    if self.read(name) != data:
                        raise FileExistsError(f"{self.where(name)} is there already") from None

        self._insist(name, put)

    def replace(self, name: str, data: bytes) -> None:
        self._insist(name, partial(self._put_held, name, data, "overwrite"))

    def append(self, name: str, text: str) -> None:
        """Puts the whole log again, as it is small, if it is still what was read.

        Raises:
            StageError: others were faster for ``UPDATE_TIMEOUT_S``.
        """
        deadline, sent = time.monotonic() + UPDATE_TIMEOUT_S, None
        while time.monotonic() < deadline:
            old, version = self._read_with_version(name)
            if sent is not None and old is not None and old.startswith(sent):  # it arrived, and its reply was lost
                return
            sent = (old or b"") + text.encode()
            if self._put_over(name, version, sent):
                return
            time.sleep(random.uniform(0, 0.1))
        raise self._busy(name)

    def new_attempt_folder(self) -> Path:
        return new_attempt(CACHE)

    def create_folder(self, name: str, attempt: Path) -> None:
        """Uploads the files, then the manifest, because readers trust only the manifest.

        Raises:
            FileExistsError: the folder is already committed.
        """
        manifest = attempt / MANIFEST
        if self.exists(f"{name}/{manifest.name}"):
            raise FileExistsError(f"{self.where(name)} is there already")
        for file in sorted(attempt.rglob("*")):
            if file.is_file() and file != manifest:
                with self._held():
                    target = f"{name}/{file.relative_to(attempt).as_posix()}"
                    self._insist(target, lambda file=file, target=target: obstore.put(self._store, target, file))
        self.create(f"{name}/{manifest.name}", manifest.read_bytes())
        shutil.rmtree(attempt)

    def delete(self, name: str) -> None:
        with self._held():
            inside = self._insist(name, lambda: obstore.list(self._store, name).collect())
            for path in [name, *(one["path"] for one in inside)]:
                try:
                    self._insist(path, lambda path=path: obstore.delete(self._store, path))
                except FileNotFoundError:
                    continue

    def digest(self, name: str) -> Digest:
        """Reads the object in pieces, because weights may exceed memory."""
        found, size = hashlib.sha256(), 0
        for chunk in self._chunks(name):
            found.update(chunk)
            size += len(chunk)
        return Digest(found.hexdigest(), size)

    def local_folder(self, name: str, files: Mapping[str, Digest]) -> Path:
        return folder_with(CACHE, files, partial(self._download, name), self.where(name))

    def swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        found, version = self._read_with_version(name)
        if found != old:
            return False
        if new is None:
            self.delete(name)
            return True
        return self._put_over(name, version, new) or self.find(name) == new

    def _put_over(self, name: str, version: Any, data: bytes) -> bool:
        """Replaces a version of ``name``; False if it is another by now: also by this put, if its reply was lost."""
        try:
            self._insist(name, partial(self._put_held, name, data, version))
        except FileNotFoundError as error:
            raise self._no_bucket() from error
        except (AlreadyExistsError, PreconditionError):
            return False
        return True

    def _no_bucket(self) -> ConfigError:
        return ConfigError(f"{self._uri}: the store has no such bucket; make it, or choose another --out")

    def _put_held(self, name: str, data: bytes, mode: Any) -> None:
        with self._held():
            obstore.put(self._store, name, data, mode=mode)

    def _read_with_version(self, name: str) -> tuple[bytes | None, Any]:
        """Returns bytes, and the mode of a put that replaces this version: its tag (S3) or generation (GCS)."""

        def read() -> tuple[bytes, dict[str, str]]:
            found = obstore.get(self._store, name)
            version = {"e_tag": found.meta["e_tag"], "version": found.meta["version"]}
            return bytes(found.bytes()), {key: value for key, value in version.items() if value is not None}

        try:
            return self._insist(name, read)
        except FileNotFoundError:
            return None, "create"

    def _download(self, folder: str, name: str, target: Path) -> None:
        """Downloads a file of an artefact; raises RunDirError if the store has it no more."""
        with target.open("wb") as file:
            try:
                for chunk in self._chunks(f"{folder}/{name}"):
                    file.write(chunk)
            except FileNotFoundError as error:
                where = self.where(folder)
                raise RunDirError(f"{where}/{name}: is missing; restore it or remove {where}") from error

    def _chunks(self, name: str) -> Iterator[bytes]:
        """Yields the object in pieces; after a failure it goes on behind the last piece.

        A request ends after ``_REQUEST_S``, its body included: over a slow link a large object takes several.
        """
        stream: Iterator[bytes] | None = None
        done, size = 0, None

        def next_chunk() -> bytes:
            nonlocal stream, size
            if done == size:
                return b""
            if stream is None:
                found = obstore.get(self._store, name, options={"range": {"offset": done}} if done else None)
                stream, size = iter(found.stream(min_chunk_size=2**23)), found.meta["size"]
            try:
                return bytes(next(stream, b""))
            except BaseError:
                stream = None
                raise

        while chunk := self._insist(name, next_chunk):
            done += len(chunk)
            yield chunk

    @cached_property
    def _store(self) -> ObjectStore:
        return from_url(
            self._uri,
            client_options={"allow_http": _endpoint().startswith("http://"), "timeout": timedelta(seconds=_REQUEST_S)},
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=DEADLINE_S)},
        )

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Checks the lease; a change already sent during a takeover can still arrive."""
        self._check_lease()
        yield

    def _insist(self, name: str, call: Callable[[], T]) -> T:
        """Repeats ``call`` while the store fails, with growing pauses and jitter.

        Raises:
            StageError: still failing ``DEADLINE_S`` after the first failure, and after ``LEAST_TRIES``; a store that
                never answered ``FIRST_ANSWER_S`` after the first try.
            ConfigError: the store never answered, and credentials are missing or refused.
        """
        begun, failed_at, tries, pause_s = time.monotonic(), None, 0, 0.1
        while True:
            tries += 1
            try:
                found = call()
                self._has_answered = True
                return found
            except (FileNotFoundError, AlreadyExistsError, PreconditionError):
                self._has_answered = True
                raise
            except BaseError as error:
                now = time.monotonic()
                if not self._has_answered:
                    self._refuse_without_access(error, now - begun)
                    self._has_answered = _is_answer(error)
                if not self._has_answered and now + pause_s > begun + FIRST_ANSWER_S:
                    raise self._silent(error, now - begun, tries) from error
                failed_at = now if failed_at is None else failed_at
                if now + pause_s > failed_at + DEADLINE_S and tries >= LEAST_TRIES:
                    raise StageError(
                        f"{self.where(name)}: the store failed for {now - failed_at:.0f} s, {tries} times "
                        f"({_reason(error)}); run the command again, everything committed is kept"
                    ) from error
                logger.info("%s: tried again in %.1f s (%s)", self.where(name), pause_s, _reason(error))
                time.sleep(pause_s * random.uniform(0.5, 1.5))
                pause_s = min(2 * pause_s, 10.0)

    def _silent(self, error: BaseError, waited_s: float, tries: int) -> StageError:
        place = next((f" at {name} {url}" for name in _ENDPOINTS if (url := os.environ.get(name))), "")
        return StageError(
            f"{self._uri}: the store{place} has not answered for {waited_s:.0f} s, {tries} times ({_reason(error)}); "
            "is it running, and is this its address? Then run the command again"
        )

    def _refuse_without_access(self, error: BaseError, waited_s: float) -> None:
        refused = isinstance(error, UnauthenticatedError | PermissionDeniedError)
        without = any(server in str(error) for server in _METADATA) and waited_s >= FIRST_DEADLINE_S
        if refused or without:
            said = "refuses the credentials" if refused else "no credentials were found"
            raise ConfigError(f"{self._uri}: {said}; {_CREDENTIALS}") from error


def _reopened(root: str, token: str | None, has_answered: bool) -> ObjectStorage:
    return ObjectStorage(root, token, has_answered=has_answered)


def _is_answer(error: BaseError) -> bool:
    """Tells whether the store itself said what is wrong, e.g. 503, and not a server of credentials."""
    text = str(error)
    return "status code" in text and not any(server in text for server in _METADATA)


def _reason(error: BaseError) -> str:
    """Returns the system's reason, such as ``Connection refused``, which obstore tells below its own line."""
    text = str(error)
    said = _SAID.findall(text)
    return said[-1] if said else "timed out" if "TimedOut" in text else first_line(error)


def _endpoint() -> str:
    for name in _ENDPOINTS:
        if os.environ.get(name):
            return os.environ[name]
    for name in ACCOUNT:
        with suppress(OSError, ValueError, AttributeError):
            return str(json.loads(Path(os.environ.get(name, "")).read_text()).get("gcs_base_url", ""))
    return ""


def open_storage(out: str | Path) -> Storage:
    """Returns the storage of a folder or store.

    Raises:
        ConfigError: unknown URI scheme.
    """
    text = str(out)
    scheme, colon, _ = text.partition("://")
    if not colon or scheme == "file":
        return Storage(text)
    if scheme not in _SCHEMES:
        raise ConfigError(f"{text}: {scheme}:// is no store that can hold a run; give s3://, gs:// or a folder")
    return ObjectStorage(text)
