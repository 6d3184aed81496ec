"""Data files: their kind, bytes and slices."""

import io
import re
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs

from spin_ray.config.paths import is_remote, local_path
from spin_ray.errors import DataError, first_line
from spin_ray.inputs.hub import PREFIX, hub_filesystem
from spin_ray.run_dir.google import share_google_account

KINDS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow")
TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
CODECS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (*KINDS, *(text + codec for text in TEXTS for codec in CODECS))
CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Slice:
    """Part of a file, in bytes of text, row groups of Parquet or record batches of Arrow."""

    uri: str
    start: int
    stop: int


class SourceRow(NamedTuple):
    origin: str
    """File and place."""
    content: dict[str, Any] | None
    """Columns; None if the row is no JSON object."""
    raw: bytes
    """Bytes of the row (for tables: JSON)."""
    unread: tuple[str, ...] = ()
    """Columns that were not read; those of ``MEDIA`` only if the row may fill them."""
    fault: str = "not a JSON object"
    """Reason why ``content`` is None."""


def kind_of(uri: str) -> str:
    """Returns the suffix of the kind, ignoring that of the compression."""
    name = uri[: -len(codec)] if (codec := codec_of(uri)) else uri
    return next((kind for kind in KINDS if name.lower().endswith(kind)), "")


def codec_of(uri: str) -> str | None:
    return next((suffix for suffix in CODECS if uri.lower().endswith(suffix)), None)


GOOGLE_S = 30
"""Longest wait for an answer of Google Cloud Storage, in seconds."""


def filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Returns the file system of a path or URI, and the path in it; raises DataError if there is none."""
    if uri.startswith(PREFIX):
        return hub_filesystem(path := uri.removeprefix(PREFIX)), path
    if not is_remote(uri):
        if not uri or "\0" in uri:
            raise DataError(f"data: the path is {'no path (it has a NUL)' if uri else 'empty'}")
        return pyarrow.fs.LocalFileSystem(), str(local_path(uri))  # absolute: Ray workers run elsewhere
    limited = uri
    if uri.startswith(("gs://", "gcs://")):
        share_google_account()
        limited += "" if "?" in uri else f"?retry_limit_seconds={GOOGLE_S}"  # pyarrow's own limit is 15 minutes
    try:
        return pyarrow.fs.FileSystem.from_uri(limited)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri}: cannot be opened ({first_line(error)}){_cure_of(uri)}") from error


def _cure_of(uri: str) -> str:
    if not uri.startswith(("https://", "http://")):
        return ""
    if found := _PAGE.match(uri):
        name, revision, file = (unquote(part or "") for part in found.groups())
        return f"; of the hub it is hf://datasets/{name}{f'@{revision}' if revision else ''}/{file or 'FILE'}"
    return "; download the file, and name that"


_PAGE = re.compile(
    r"https?://huggingface\.co/datasets/([\w.-]+/[\w.-]+)(?:/(?:resolve|blob|tree|raw)/([^/?#]+)(?:/([^?#]+))?)?"
)


def open_text(uri: str) -> io.BufferedReader:
    """Opens a file's decompressed bytes; only uncompressed files can seek."""
    store, path = filesystem(uri)
    codec = codec_of(uri)
    opened = store.open_input_file(path)
    stream = pa.CompressedInputStream(opened, CODECS[codec]) if codec else opened
    return io.BufferedReader(cast(Any, stream), buffer_size=CHUNK)


def head_of(uri: str, size: int = 512) -> bytes:
    """Returns a text's first bytes, without byte order mark and leading blanks.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is not what its name says.
    """
    try:
        with open_text(uri) as file:
            head = cast(BinaryIO, file).read(size)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{uri}: cannot be read ({' '.join(str(error).split())})") from error
    if found := other_kind(head):
        raise DataError(f"{uri}: {found}")
    if wide := _wide(head):
        raise DataError(f"{uri}: is {wide}; write it as UTF-8: iconv -f {wide} -t UTF-8 FILE > NEW")
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()


def _wide(head: bytes) -> str | None:
    if head[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") or head[1:4] == b"\0\0\0" or head[:3] == b"\0\0\0":
        return "UTF-32"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or (head[:1] == b"\0" and head[1:2] in b'{["') or head[1:4:2] == b"\0\0":
        return "UTF-16"
    return None


_BEGINNINGS = {
    b"\x1f\x8b": "is gzip; its name must end with .gz",
    b"\x28\xb5\x2f\xfd": "is zstd; its name must end with .zst",
    b"PAR1": "is Parquet; its name must end with .parquet",
    b"ARROW1": "is Arrow; its name must end with .arrow",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"BZh": "is bzip2; unpack it",
    b"\xfd7zXZ": "is xz; unpack it",
    b"version https://git-lfs": "is a pointer of Git LFS and not the data; fetch it by git lfs pull",
    b"<!DOCTYPE": "is a web page; download the file itself",
    b"<HTML": "is a web page; download the file itself",
}
"""Error messages by a file's first bytes."""


def cure_of_name(uri: str) -> str | None:
    """Returns the kind and cure of a file whose name tells of no kind; None if its beginning tells of none, either."""
    if codec_of(uri):
        return "is compressed; unpack it (text alone may be compressed)"
    store, path = filesystem(uri)
    try:
        with store.open_input_file(path) as file:
            head = file.read(512)
    except (pa.ArrowException, OSError):
        return None
    if head.startswith(b"PK") and uri.lower().endswith((".xlsx", ".xlsm", ".ods")):
        return "is a table of a spreadsheet; save it as CSV in UTF-8"
    return other_kind(head) or json_kind(head.decode(errors="replace").lstrip("\ufeff \t\r\n"))


def json_kind(text: str) -> str | None:
    """Returns the cure of JSON under another name."""
    if re.match(r'\{\s*"|\[\s*\{', text):
        return f"is JSON; its name must end with {'.json' if text[0] == '[' else '.jsonl'}"
    return None


def other_kind(head: bytes, kind: str = "") -> str | None:
    """Returns the kind and cure of data that begins with ``head``; None for text, and for ``kind`` itself."""
    own = {".parquet": b"PAR1", ".arrow": b"ARROW1"}.get(kind)
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it"
    head = head[:9].upper() + head[9:] if head[:1] == b"<" else head
    return next((said for begins, said in _BEGINNINGS.items() if head.startswith(begins) and begins != own), None)
