"""Data sets of foreign configs, as paths and URIs of ``data.train`` and ``data.heldout``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spin_ray.inputs.files import SUFFIXES
from spin_ray.loop.init.foreign import Foreign
from spin_ray.loop.init.settings import Setting

_LOADERS = ("json", "csv", "parquet", "arrow")
"""Names of loaders, whose data is in ``data_files``."""
_READ = ("path", "name", "split", "data_files", "file_name", "hf_hub_url", "subset", "columns")
"""Keys of a data set that are read. Other keys are reported."""
_MAY = {name: name for name in ("system", "tools", "chosen", "rejected")} | {"kto_tag": "label"}
_COLUMNS_OF = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history", **_MAY},
    "sharegpt": {"messages": "conversations", **_MAY},
    "openai": {"messages": "messages", **_MAY},
}
"""A form's columns by LLaMA-Factory's word for them, by formatting."""


def put_data(found: Foreign) -> None:
    """Carries the data sets over. A data set that is not found stays unset, so that a person is asked."""
    entries = {name: _entries(found, name) for name in ("train", "heldout")}
    train = _paths(found, "train", entries["train"])
    if train:
        found.settings["data.train"] = Setting(_value(train), found.why("train"))
    heldout = _paths(found, "heldout", entries["heldout"]) or _heldout_split(found)
    if heldout:
        found.settings["data.heldout"] = Setting(_value(heldout), found.why("heldout", "heldout_split", "splits"))
    _put_columns(found, entries)
    if len(train) == 1 and found.settings["data.train"].value:
        found.put("data.max_rows", "max_rows", int)
    else:
        found.leave("max_rows", "holds for each data set there; give data.train's own rows")


def _value(paths: list[str]) -> Any:
    return paths[0] if len(paths) == 1 else [{"path": path} for path in paths]


def _put_columns(found: Foreign, entries: Mapping[str, list[Mapping[str, Any]]]) -> None:
    """Carries the names of columns over, which a recipe has for all its data."""
    first, *others = [_columns(entry) for entry in entries["train"]] or [{}]
    shared = first if all(other == first for other in others) else {}
    if shared:
        found.settings["data.columns"] = Setting(shared, f"columns of {found.why('train')}")
    for name, listed in entries.items():
        for number, entry in enumerate(listed):
            key, said = f"{found.given[name][0]}.{number}.columns", entry.get("columns")
            if said is not None and not isinstance(said, Mapping):  # TRL's list of columns to keep
                found.left[key] = f"{said!r} is not read"
            elif _columns(entry) != shared:
                found.left[key] = f"{said or 'no names'}: data.columns is one for all data sets"
            elif unread := [theirs for theirs in said or {} if theirs not in _COLUMNS_OF[_formatting(entry)]]:
                found.left[key] = f"{', '.join(unread)}: is not read"


def _columns(entry: Mapping[str, Any]) -> dict[str, str]:
    """Returns ``data.columns`` of a data set in LLaMA-Factory's registry, without names that stay."""
    known, said = _COLUMNS_OF[_formatting(entry)], entry.get("columns")
    given = said if isinstance(said, Mapping) else {}
    named = {known[theirs]: name for theirs, name in given.items() if theirs in known and name}
    return {ours: name for ours, name in named.items() if ours != name}


def _formatting(entry: Mapping[str, Any]) -> str:
    said = str(entry.get("formatting"))
    return said if said in _COLUMNS_OF else "alpaca"


def _heldout_split(found: Foreign) -> list[str]:
    split = found.fact("heldout_split") or next((each for each in found.fact("splits") or [] if "test" in each), None)
    train = found.fact("train")
    names = [train] if isinstance(train, str) else list(train or ())
    if split is None or len(names) != 1 or not isinstance(names[0], str):
        return []
    return [_path({"path": names[0], "name": found.fact("subset"), "split": split})]


def _entries(found: Foreign, name: str) -> list[Mapping[str, Any]]:
    """Returns the data sets that the config names."""
    value = found.fact(name)
    if value is None:
        return []
    if isinstance(value, str) and "folder" not in found.tool.keys.values():
        value = [{"path": value, "name": found.fact("subset"), "split": found.fact("split") or "train"}]
    elif isinstance(value, str):
        value = _registered(found, name, [part.strip() for part in value.split(",")])
    elif isinstance(value, Mapping):
        split = next((each for each in found.fact("splits") or [] if "train" in each), "train")
        value = [{"path": path, "split": split, "fraction": part} for path, part in value.items()]
    return [{"path": entry} if isinstance(entry, str) else entry for entry in value]


def _paths(found: Foreign, name: str, entries: list[Mapping[str, Any]]) -> list[str]:
    paths = []
    for number, entry in enumerate(entries):
        key = found.given[name][0]
        for other, content in entry.items():
            if other not in _READ and content is not None and (other, content) != ("fraction", 1.0):
                found.left[f"{key}.{number}.{other}"] = f"{content!r} is not read"
        if "[" in str(entry.get("split")):
            found.left[f"{key}.{number}.split"] = f"{entry['split']!r}: the whole split is taken"
        elif entry.get("split") not in (None, "train") and _is_local(str(entry.get("path"))):
            found.left[f"{key}.{number}.split"] = f"{entry['split']!r}: every file of a folder is read"
        paths += _files(entry)
    return paths


def _registered(found: Foreign, name: str, wanted: list[str]) -> list[dict[str, Any]]:
    given = Path(found.fact("folder")).expanduser()
    places = [given, found.file.parent / given, found.file.parent]
    folder = next((place for place in places if (place / "dataset_info.json").is_file()), given)
    try:
        known = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if missing := [each for each in wanted if each not in known]:
        found.leave(name, f"{missing[0]} is not in {folder / 'dataset_info.json'}; give the file itself")
        return []
    return [
        known[each] | ({"path": str(folder / known[each]["file_name"])} if "file_name" in known[each] else {})
        for each in wanted
    ]


def _files(entry: Mapping[str, Any]) -> list[str]:
    files = entry.get("data_files")
    if isinstance(files, Mapping):
        files = files.get("train", [])
    return [_path(entry, file) for file in files] if isinstance(files, list) else [_path(entry, files)]


def _path(entry: Mapping[str, Any], files: str | None = None) -> str:
    path = str(entry.get("path") or entry.get("hf_hub_url"))
    if isinstance(files, str) and path in _LOADERS:
        return files
    local = _is_local(path)
    if isinstance(files, str):
        return f"{path}/{files}" if local else f"hf://datasets/{path}/{files}"
    if local:
        return path
    # The hub keeps a copy of most data sets in Parquet, under this revision.
    split = str(entry.get("split") or "train").partition("[")[0]
    subset = entry.get("name") or entry.get("subset") or "default"
    return f"hf://datasets/{path}@refs/convert/parquet/{subset}/{split}/*.parquet"


def _is_local(path: str) -> bool:
    return "://" in path or path.startswith((".", "/", "~")) or path.endswith(SUFFIXES) or Path(path).exists()
