"""Data files of a source, their slices and rows."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from math import ceil
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs

from spin_ray.errors import DataError
from spin_ray.inputs.files import SUFFIXES, TEXTS, Slice, SourceRow, codec_of, cure_of_name, kind_of
from spin_ray.inputs.files import filesystem as _filesystem
from spin_ray.inputs.forms import COLUMNS, OTHER_NAMES
from spin_ray.inputs.tables import count_table, read_table, split_table
from spin_ray.inputs.texts import count_text, estimate_text, read_text, split_text

__all__ = [
    "Slice", "SourceRow", "count_rows", "estimate_rows", "files_digest", "find_files", "is_estimated", "read_slice",
    "rows_in", "skipped_files", "split",
]  # fmt: skip

SLICE_BYTES = 2**20
MOST_SLICES = 4096
_ESTIMATED_FILES = 8
"""Files whose rows stand for those of all."""
_BESIDE_DATA = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def find_files(source: str) -> list[str]:
    """Returns the sorted files of a path, folder, glob or URI.

    Raises:
        DataError: a file is missing, empty or of an unknown kind.
    """
    filesystem, path = _filesystem(source)
    try:
        infos = [info for info in _listed(filesystem, path, source) if info.type == pyarrow.fs.FileType.File]
    except (OSError, pa.ArrowException) as error:
        if "OAuth2 access token" in str(error):
            raise DataError(
                f"{source}: no Google account was found; name its file by GOOGLE_APPLICATION_CREDENTIALS in the "
                "environment of driver and nodes; public data is gs://anonymous@BUCKET/…"
            ) from error
        raise DataError(f"{source}: cannot be read ({' '.join(str(error).split())})") from error
    if not infos:
        shown, hint = " ".join(source.split()), _hint(source)
        raise DataError(f"{shown}: no such data (a .jsonl or .parquet file, a folder of them, a glob or a URI){hint}")
    prefix = source[: source.index("://") + 3] if "://" in source else ""
    for info in infos:
        if not info.path.lower().endswith(SUFFIXES):
            unknown = f"unknown kind of data file; expected one of {', '.join(SUFFIXES)}"
            raise DataError(f"{info.path}: {cure_of_name(prefix + info.path) or unknown}")
        if info.size == 0:
            raise DataError(f"{info.path}: is empty")
    return sorted(prefix + info.path for info in infos)


def _hint(source: str) -> str:
    if _HUB_NAME.fullmatch(source) and not source.lower().endswith(SUFFIXES):
        return f"; of the hub it is hf://datasets/{source}/FILE"
    if "$" in source:
        return "; variables of the shell are not read: write the path out"
    if re.search(r"\{.*,.*\}|,", source):
        return "; several sources are a list: [{path: a.jsonl}, {path: b.jsonl}]"
    return ""


def _listed(filesystem: pyarrow.fs.FileSystem, path: str, source: str) -> list[pyarrow.fs.FileInfo]:
    wild = _WILD.search(path)
    if wild and ("*" in path or filesystem.get_file_info(path).type == pyarrow.fs.FileType.NotFound):
        base = path[: path[: wild.start()].rfind("/") + 1]
        below = "/" in path[len(base) :]
        infos = filesystem.get_file_info(pyarrow.fs.FileSelector(base, recursive=below, allow_not_found=True))
        matching = [info for info in infos if _matches(info.path, path)]
        files = [info.path for info in matching if info.type == pyarrow.fs.FileType.File]
        known = [file for file in files if file.lower().endswith(SUFFIXES)]
        _refuse_several_splits(known, base, source, source.removesuffix(path.removeprefix(base)))
        _refuse_columns_of_folders(files, base, source)
        return matching
    info = filesystem.get_file_info(path)
    if info.type != pyarrow.fs.FileType.Directory:
        return [info]
    infos = _inside(filesystem, path)
    if saved := _saved_files(filesystem, path, infos):
        return saved
    found = [info for info in infos if info.type == pyarrow.fs.FileType.File and _is_data(info.path, path)]
    _refuse_several_splits([info.path for info in found], path, source, f"{source.rstrip('/')}/")
    _refuse_columns_of_folders([info.path for info in found], path, source)
    return found


def _refuse_columns_of_folders(files: list[str], folder: str, source: str) -> None:
    """Refuses Hive's partitions by a column of the forms: the files themselves lack it."""
    for file in files:
        for part in _below(file, folder).split("/")[:-1]:
            name, equals, _ = part.partition("=")
            if equals and unquote(name) in (*COLUMNS, *OTHER_NAMES):
                raise DataError(
                    f"{source}: the folder {part} holds the column {name} in its name, which is not read; write it "
                    "into the files, or name folders whose rows are all to be learnt one by one"
                )


def _refuse_several_splits(files: list[str], folder: str, source: str, above: str) -> None:
    """Refuses files of which some names tell of another split.

    Args:
        above: the folder as ``source`` names it, with the slash that ends it.
    """
    parts: dict[str, dict[str, list[str]]] = {}
    words: dict[str, str] = {}
    for file in sorted(files):
        below = _below(file, folder)
        if found := [*_SPLIT.finditer(below)]:
            last = found[-1]  # the word closest to the file's end
            split = str(last.lastgroup)
            words.setdefault(split, last[0])
            parts.setdefault(split, {}).setdefault(_part_of(below, last.end()), []).append(below)
    if len(parts) < 2:
        return
    of_split = parts[min({"train"} & parts.keys() or parts)]
    part = min(of_split, key=lambda name: ("sft" not in name, name))
    several = f" in several configurations ({', '.join(each[1:] for each in of_split)})" if len(of_split) > 1 else ""
    raise DataError(
        f"{source}: holds files of several splits ({', '.join(sorted(words))}){several}; a list of sources joins "
        f"several; name one, e.g. {above}{_glob_of(part, of_split[part]).lstrip('/')}"
    )


def _part_of(below: str, end: int) -> str:
    """Returns the folder that names a split, or the file's path without suffix and number: one configuration's files.

    Args:
        end: end of the split's word.
    """
    if "/" in below[end:]:
        return below[: below.index("/", end)]
    suffix = max((each for each in SUFFIXES if below.lower().endswith(each)), key=len)
    return below[: max(end, len(_SHARD.sub("", below[: -len(suffix)])))]


def _glob_of(part: str, files: list[str]) -> str:
    if files[0].startswith(f"{part}/"):
        return part
    if len(files) == 1:
        return files[0]
    signs = {file[len(part)] for file in files}
    return part + (f"{min(signs)}*" if len(signs) == 1 and signs <= {*"-_. "} else "*")


def _inside(filesystem: pyarrow.fs.FileSystem, path: str) -> list[pyarrow.fs.FileInfo]:
    return filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))


def _is_data(path: str, folder: str) -> bool:
    name = path.rpartition("/")[2]
    # ``datasets`` caches results of map() beside the data, as cache-*.arrow
    made = name in _BESIDE_DATA or name.startswith("cache-")
    return path.lower().endswith(SUFFIXES) and not made and not _BESIDE.search(_below(path, folder))


def _below(path: str, folder: str) -> str:
    return "/" + path.removeprefix(folder).lstrip("/")


def _saved_files(
    filesystem: pyarrow.fs.FileSystem, path: str, infos: list[pyarrow.fs.FileInfo]
) -> list[pyarrow.fs.FileInfo] | None:
    inside = {info.path.removeprefix(path.rstrip("/") + "/"): info for info in infos}
    if "dataset_dict.json" in inside:
        with filesystem.open_input_stream(inside["dataset_dict.json"].path) as file:
            splits = json.loads(file.read()).get("splits", [])
        raise DataError(
            f"{path}: holds the splits {', '.join(splits)}; name one, e.g. {path}/{splits[0] if splits else ''}"
        )
    if "state.json" not in inside:
        return None
    with filesystem.open_input_stream(inside["state.json"].path) as file:
        state = json.loads(file.read())
    if state.get("_indices_data_files"):
        raise DataError(f"{path}: its rows are selected by an index; save it again after flatten_indices()")
    names = [each["filename"] for each in state.get("_data_files", [])]
    missing = [name for name in names if name not in inside]
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}, which state.json names")
    return [inside[name] for name in names]


def skipped_files(source: str) -> list[str]:
    """Returns a folder's files that are not read, without hidden files and known metadata."""
    filesystem, path = _filesystem(source)
    if filesystem.get_file_info(path).type != pyarrow.fs.FileType.Directory:
        return []
    infos = _inside(filesystem, path)
    if any(info.path.endswith("/state.json") for info in infos):
        return []
    files = [info.path for info in infos if info.type == pyarrow.fs.FileType.File and not _is_data(info.path, path)]
    names = {file: file.rpartition("/")[2] for file in files if "/." not in _below(file, path)}
    return sorted(file for file, name in names.items() if name not in ("_SUCCESS", *_BESIDE_DATA))


def _matches(path: str, glob: str) -> bool:
    """Matches a glob like a shell: ``**/`` is any number of folders; wildcards match no leading dot."""
    parts = _WILD.split(glob)
    marks = [_MEANING.get(mark, mark.replace("[!", "[^")) for mark in _WILD.findall(glob)]
    pattern = "".join(re.escape(part) + mark for part, mark in zip(parts, [*marks, ""], strict=True))
    return re.fullmatch(pattern, path) is not None


_HUB_NAME = re.compile(r"[\w-]+/[\w.-]+(@[\w./-]+)?")
_WILD = re.compile(r"\*\*/|\*|\?|\[[^/\]]+\]")
_MEANING = {"**/": r"(?:(?!\.)[^/]+/)*", "*": r"(?:(?<!/)|(?!\.))[^/]*", "?": r"(?:(?<!/)|(?!\.))[^/]"}
_SPLITS = {
    "train": "train(ing|set|data)?",
    "test": "test(ing|set|data)?|eval(uation|set|data)?|(held|hold)[-_ ]?out",
    "validation": "validation|valid(set)?|val(set|data)?|dev(set|data)?",
}
_SPLIT = re.compile(
    rf"(?<![^\W\d_])(?:{'|'.join(f'(?P<{name}>{words})' for name, words in _SPLITS.items())})(?![^\W\d_])",
    re.IGNORECASE,
)
"""A split's word that no letter touches: digits, signs and blanks part words, as they do for ``datasets``."""
_SHARD = re.compile(r"[-_. ]?\d+(?:[-_]of[-_]\d+(?:-\w+)?)?$")
_BESIDE = re.compile(r"/[._]")
"""Beginning of hidden names and of programs' own names."""


def files_digest(files: list[str]) -> str:
    """Returns a SHA-256 of local files' content, and of remote files' URI, size and time."""
    total = hashlib.sha256()
    for uri in files:
        filesystem, path = _filesystem(uri)
        if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        else:
            info = filesystem.get_file_info(path)
            total.update(f"{uri} {info.size} {info.mtime_ns}".encode())
    return total.hexdigest()


def split(files: list[str]) -> list[Slice]:
    """Splits files into slices of 1 MiB (more for large data) or row groups; raises DataError if there are none."""
    sizes = {uri: _size(uri) for uri in files}
    width = max(SLICE_BYTES, sum(sizes.values()) // MOST_SLICES)
    slices = []
    for uri in files:
        slices += split_text(uri, sizes[uri], width) if kind_of(uri) in TEXTS else split_table(uri, width)
    if not slices:
        raise DataError(f"{', '.join(files)}: holds no rows")
    return slices


def _size(uri: str) -> int:
    filesystem, path = _filesystem(uri)
    return filesystem.get_file_info(path).size


def read_slice(piece: Slice, columns: Mapping[str, str] | None = None) -> Iterator[SourceRow]:
    """Yields the rows of a slice; of tables, only the columns of forms, and those of ``data.columns``."""
    return read_text(piece) if kind_of(piece.uri) in TEXTS else read_table(piece, columns or {})


def rows_in(files: Iterable[str], columns: Mapping[str, str]) -> Iterator[SourceRow]:
    """Yields the rows of files, each opened when its turn comes; raises DataError as ``split``."""
    for file in files:
        for piece in split([file]):
            yield from read_slice(piece, columns)


def count_rows(files: list[str]) -> int:
    """Counts rows as they are read, without blank lines and without parsing JSON; raises DataError as ``split``."""
    return sum(count_text(file) if kind_of(file) in TEXTS else count_table(file) for file in files)


def is_estimated(path: str) -> bool:
    """Tells whether the rows of a remote file, or of a folder, can be estimated without reading all of it."""
    return not codec_of(path) and kind_of(path) not in (".csv", ".tsv", ".arrow")


def estimate_rows(files: list[str]) -> int | None:
    """Estimates rows from the first files, and from the first MiB of JSON; None for kinds that are read whole.

    Raises:
        DataError: a file cannot be read.
    """
    if not all(map(is_estimated, files)):
        return None
    first = files[:_ESTIMATED_FILES]
    rows = sum(estimate_text(file, _size(file)) if kind_of(file) in TEXTS else count_table(file) for file in first)
    return ceil(rows * len(files) / len(first))
