"""The Hugging Face hub: models are downloaded, data is read remotely.

Offline (``HF_HUB_OFFLINE``), data comes from the client's cache. Every error is one line with its cure.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs

from spin_ray.errors import DataError, ModelError, first_line

PREFIX = "hf://"
_KINDS = {"datasets": "dataset", "spaces": "space", "models": "model"}
_KIND = f"(?:{'|'.join(_KINDS)})/"
_NAMED = re.compile(
    rf"({_KIND})?(?!{_KIND})([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*))?", re.DOTALL
)
_WEIGHTS = ["*.safetensors"]
_FETCHED = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md"]
_FETCHED += [f"{name}{end}" for name in ("LICEN[SC]E", "NOTICE", "USE_POLICY") for end in ("", "*.md")]
_CODE = ["*.py"]
_LEFT = ["consolidated*", "original/*", "*/*.safetensors"]
"""Files that no library opens: Mistral's and Meta's layouts, and weights of checkpoints."""
CONNECT_S, SILENCE_S = 10.0, 20.0
"""Longest wait for a connection to the hub, and for its next bytes, in seconds."""


class _Repository(NamedTuple):
    kind: str
    name: str
    revision: str | None
    inside: str

    @property
    def command(self) -> str:
        """Command that fetches the repository into the cache."""
        kind = "" if self.kind == "model" else f" --repo-type {self.kind}"
        return f"hf download {self.name}{kind}{f' --revision {self.revision}' if self.revision else ''}"


def _repository(path: str) -> _Repository:
    found = _NAMED.fullmatch(path)
    if not found or path.startswith("buckets/"):
        raise DataError(f"{PREFIX}{path}: names no data of the hub; expected hf://datasets/OWNER/NAME@REVISION/FILE")
    kind, name, revision, inside = found.groups()
    return _Repository(_KINDS[(kind or "models/")[:-1]], name, revision, inside or "")


def fetch_model(name: str, setting: str, *, with_code: bool = False, weights: bool = True) -> Path:
    """Returns the cached folder of ``OWNER/NAME`` or ``OWNER/NAME@REVISION``; raises ModelError without one.

    Without ``weights``, those may be missing.
    """
    from huggingface_hub import snapshot_download

    owner_and_name, _, revision = name.partition("@")
    limit_silence()
    wanted = [*_FETCHED, *(_WEIGHTS if weights else []), *(_CODE if with_code else [])]
    try:
        return Path(
            snapshot_download(owner_and_name, revision=revision or None, allow_patterns=wanted, ignore_patterns=_LEFT)
        )
    except Exception as error:  # the client raises its own, its HTTP library's and the system's errors
        reason = _why(error, _Repository("model", owner_and_name, revision or None, ""))
        raise ModelError(f"{setting} {name}: no such folder, and the hub did not give it ({reason})") from error


def download_command(name: str) -> str:
    """Returns the command that fetches ``OWNER/NAME`` or ``OWNER/NAME@REVISION``."""
    owner_and_name, _, revision = name.partition("@")
    return _Repository("model", owner_and_name, revision or None, "").command


def cached_model(name: str) -> Path | None:
    """Returns the cached folder of a model with its tokenizer, named as for ``fetch_model``, or None; asks no hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    owner_and_name, _, revision = name.partition("@")
    try:
        found = try_to_load_from_cache(owner_and_name, "config.json", revision=revision or None)
    except HFValidationError:
        return None
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder and any(folder.glob("tokenizer*")) else None


def hub_filesystem(path: str) -> pyarrow.fs.FileSystem:
    """Returns the file system of data on the hub; raises DataError if ``path`` (without ``hf://``) names none."""
    repository = _repository(path)
    return pyarrow.fs.PyFileSystem(_Cached(repository, path) if _is_offline() else _Online(repository))


def unpinned(uri: str) -> str | None:
    """Returns the URI with the hub's present commit; None if it names a commit or the commit is unknown."""
    if not uri.startswith(PREFIX):
        return None
    repository = _repository(uri.removeprefix(PREFIX))
    if re.fullmatch("[0-9a-f]{40}", repository.revision or "") or _is_offline():
        return None
    from huggingface_hub import HfApi

    limit_silence()
    try:
        found = HfApi().repo_info(repository.name, revision=repository.revision, repo_type=repository.kind)
    except Exception:  # reading it says why
        return None
    root = uri.removesuffix(repository.inside).rstrip("/").removesuffix(f"@{repository.revision}")
    return f"{root}@{found.sha}/{repository.inside}"


def unlisted(uri: str) -> str | None:
    """Returns the command that completes cached data; None if no file can be missing.

    Offline, only the hub's cached list of files shows that a folder or glob is complete.
    """
    if not uri.startswith(PREFIX) or not _is_offline():
        return None
    repository, path = _repository(uri.removeprefix(PREFIX)), uri.removeprefix(PREFIX)
    if _Cached(repository, path).get_file_info([path])[0].type == pyarrow.fs.FileType.File:
        return None
    try:
        from huggingface_hub import get_cached_repo_tree

        get_cached_repo_tree(repository.name, repo_type=repository.kind, revision=repository.revision)
    except Exception:  # see fetch_model; older clients keep no list
        return repository.command
    return None


def limit_silence() -> None:
    """Makes the hub's client give up on a hub that is silent, where the client itself would wait for ever.

    A download that goes on is not cut, and neither is an upload, whose commit takes as long as the hub needs.
    """
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["request"]
    if _limit not in hooks:
        hooks.append(_limit)


def _limit(request: Any) -> None:
    reads = request.method in ("GET", "HEAD")
    ours = {"connect": CONNECT_S, **({"read": SILENCE_S} if reads else {})}
    given = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = given | {name: ours[name] for name in ours if given.get(name) is None}


def _is_offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def _why(error: BaseException, repository: _Repository) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (  # type: ignore
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    name, page = repository.name, constants.ENDPOINT
    page = f"{page}/{name}" if repository.kind == "model" else f"{page}/{repository.kind}s/{name}"
    status = next((code for each in causes if (code := getattr(getattr(each, "response", None), "status_code", 0))), 0)

    def is_a(*kinds: type) -> bool:
        return any(isinstance(each, kinds) for each in causes)

    if is_a(RevisionNotFoundError):
        return f"{name} has no revision {repository.revision}"
    if is_a(GatedRepoError):
        return f"{name} is gated: accept its terms at {page}, and set HF_TOKEN to a token of yours"
    if is_a(RepositoryNotFoundError) or status in (401, 403, 404):
        hints = {
            "model": "; data is hf://datasets/OWNER/NAME/FILE",
            "dataset": f"; OWNER is needed, too: {name.partition('/')[0]} is read as the owner",
        }
        hint = hints.get(repository.kind, "") if repository.inside else ""
        return f"{page} does not exist, or HF_TOKEN may not read it{hint}"
    if is_a(OfflineModeIsEnabled) or (_is_offline() and is_a(LocalEntryNotFoundError)):
        return f"HF_HUB_OFFLINE is set, and its cache lacks this; where there is a network: {repository.command}"
    if status or is_a(HTTPError):
        said = f"status {status}" if status else _last_words(causes)
        return (
            f"{constants.ENDPOINT} does not answer ({said}); try again, name a mirror by HF_ENDPOINT, or where it "
            f"does: {repository.command} (with that in the cache, HF_HUB_OFFLINE=1 asks no hub)"
        )
    return first_line(error)


def _last_words(causes: list[BaseException]) -> str:
    return next((first_line(each) for each in reversed(causes) if str(each).strip()), type(causes[0]).__name__)


class _Online(pyarrow.fs.FSSpecHandler):
    """File system of a repository on the hub, whose errors are OSErrors of one line."""

    def __init__(self, repository: _Repository) -> None:
        from huggingface_hub import HfFileSystem

        limit_silence()
        super().__init__(HfFileSystem())
        self._repository = repository

    def get_file_info(self, paths: list[str]) -> list[pyarrow.fs.FileInfo]:
        found = []
        for path in paths:
            with self._told():
                try:
                    found.append(self._create_file_info(path, self.fs.info(path)))
                except FileNotFoundError as error:
                    if error.__cause__ is not None:  # not the file but the repository or its revision
                        raise
                    found.append(pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.NotFound))
        return found

    def get_file_info_selector(self, selector: Any) -> list[pyarrow.fs.FileInfo]:
        with self._told():
            return super().get_file_info_selector(selector)

    def open_input_file(self, path: str) -> Any:
        with self._told():
            if not self.fs.isfile(path):
                raise FileNotFoundError(path)
            return pa.PythonFile(_Told(self.fs.open(path, mode="rb"), self._told), mode="r")

    def open_input_stream(self, path: str) -> Any:
        return self.open_input_file(path)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # see fetch_model
            raise OSError(_why(error, self._repository)) from error


class _Told:
    def __init__(self, file: Any, told: Callable[[], AbstractContextManager[None]]) -> None:
        self._file, self._told = file, told

    def read(self, *size: int) -> bytes:
        with self._told():
            return self._file.read(*size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Cached(pyarrow.fs.FSSpecHandler):
    def __init__(self, repository: _Repository, path: str) -> None:
        from fsspec.implementations.local import LocalFileSystem
        from huggingface_hub import snapshot_download

        super().__init__(LocalFileSystem())
        root = path.removesuffix(repository.inside).rstrip("/")
        begins = re.split(r"[*?\[]", repository.inside)[0]
        try:
            folder = snapshot_download(
                repository.name, repo_type=repository.kind, revision=repository.revision,
                allow_patterns=[f"{begins}*"], local_files_only=True,
            )  # fmt: skip
        except Exception as error:  # see fetch_model
            raise DataError(f"{PREFIX}{path}: cannot be read ({_why(error, repository)})") from error
        self._root, self._folder = root, folder

    def _there(self, path: str) -> str:
        return self._folder + path.removeprefix(self._root)

    def get_file_info(self, paths: list[str]) -> list[pyarrow.fs.FileInfo]:
        found = pyarrow.fs.LocalFileSystem().get_file_info([self._there(path) for path in paths])
        return [_without_time(path, info) for path, info in zip(paths, found, strict=True)]

    def get_file_info_selector(self, selector: Any) -> list[pyarrow.fs.FileInfo]:
        there = pyarrow.fs.FileSelector(self._there(selector.base_dir), selector.allow_not_found, selector.recursive)
        found = pyarrow.fs.LocalFileSystem().get_file_info(there)
        return [_without_time(self._root + info.path.removeprefix(self._folder), info) for info in found]

    def open_input_file(self, path: str) -> Any:
        return super().open_input_file(self._there(path))

    def open_input_stream(self, path: str) -> Any:
        return super().open_input_stream(self._there(path))


def _without_time(path: str, info: pyarrow.fs.FileInfo) -> pyarrow.fs.FileInfo:
    """Drops the time, which the hub does not tell, so that digests are the same offline."""
    return pyarrow.fs.FileInfo(path, info.type, size=info.size)
