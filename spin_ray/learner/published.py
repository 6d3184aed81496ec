"""Files of a model folder that other programs read: config.json, the ends of a turn, the chat template."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = "chat_template.jinja"
_WITH_TEMPLATES = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_GENERATION = "generation_config.json"
_OTHER_TEMPLATES = ("chat_template.json", "additional_chat_templates")
_DTYPES = ("torch_dtype", "dtype")
_SAYS_NOTHING = {*_DTYPES, "_name_or_path", "transformers_version", "architectures", "auto_map"}
"""Keys of config.json that do not change what a model computes."""


def keep_form_of_config(target: Path, source: Path, dtype: str, *, trust_remote_code: bool) -> None:
    """Writes ``target``'s config.json once more, with the keys and values of ``source``'s and with ``dtype``.

    transformers 5 writes other keys than models are published with, e.g. ``rope_parameters`` for ``rope_theta``.
    Programs that know only the published keys would take defaults. The file stays as transformers wrote it if
    transformers itself would read another model from ``source``'s keys.
    """
    file = target / "config.json"
    made = json.loads(file.read_text(encoding="utf-8"))
    _set_dtype(made, dtype)
    _write_json(file, made)
    meant, kept = _read_meaning(target, trust_remote_code), read_json(source / "config.json")
    if meant is None or not kept:
        return
    if made.get("architectures") and not {*made["architectures"]} <= {*(kept.get("architectures") or ())}:
        kept["architectures"] = made["architectures"]
    if not made.get("quantization_config"):
        kept.pop("quantization_config", None)
    _set_dtype(kept, dtype)
    if not _write_as_meant(file, kept, meant, trust_remote_code):
        _write_json(file, made)


def _write_as_meant(file: Path, kept: dict[str, Any], meant: dict[str, Any], trust_remote_code: bool) -> bool:
    """Writes ``kept``, with what training has changed; tells whether transformers then reads ``meant``."""
    _write_json(file, kept)
    if (found := _read_meaning(file.parent, trust_remote_code)) is None:
        return False
    changed = {
        key: value
        for key, value in meant.items()
        if (key not in found or found[key] != value) and not isinstance(value, dict | list)
    }
    if changed:
        _write_json(file, kept | changed)
        found = _read_meaning(file.parent, trust_remote_code)
    return found == meant


def _read_meaning(folder: Path, trust_remote_code: bool) -> dict[str, Any] | None:
    """Returns config.json as transformers reads it, without ``_SAYS_NOTHING``; None if it does not."""
    from transformers import AutoConfig  # slow

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        return _without(json.loads(json.dumps(config.to_dict(), default=str)))
    except Exception:  # a class from the model's own code may raise anything
        return None


def _without(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without(value) for key, value in tree.items() if key not in _SAYS_NOTHING}
    return [_without(value) for value in tree] if isinstance(tree, list) else tree


def _set_dtype(config: dict[str, Any], name: str) -> None:
    others = [key for key in config if key.endswith("_config") and key != "quantization_config"]
    parts = [config[key] for key in others if isinstance(config[key], dict)]
    for scope in (config, *parts):
        scope.update({key: name for key in _DTYPES if key in scope})
    if not any(key in config for key in _DTYPES):
        config["torch_dtype"] = name  # older programs know this key alone, and newer ones both


def name_end(folder: Path, end: int, start: Path, *, trust_remote_code: bool) -> None:
    """Adds ``end`` to the tokens at which ``generate`` stops, if generation_config.json lacks it.

    Without that file, an adapter's folder gets the one that transformers makes for the model in ``start``.
    """
    file = folder / _GENERATION
    if not file.is_file():
        from transformers import AutoConfig, GenerationConfig  # slow

        model = AutoConfig.from_pretrained(str(start), trust_remote_code=trust_remote_code)
        GenerationConfig.from_model_config(model).save_pretrained(str(folder))
    config = read_json(file)
    if end not in (ends := ends_of(config)):
        own = ends or ends_of(read_json(start / "config.json"))
        _write_json(file, config | {"eos_token_id": [*dict.fromkeys([*own, end])]})


def ends_at(folder: Path) -> list[int]:
    """Returns the ids at which ``generate`` stops: those of generation_config.json, or of config.json without it."""
    files = [folder / name for name in (_GENERATION, "config.json")]
    return next((ends_of(read_json(file)) for file in files if file.is_file()), [])


def ends_of(config: Mapping[str, Any]) -> list[int]:
    """Returns ``eos_token_id`` of a generation_config.json or config.json, or of its ``text_config``, as a list."""
    text = config.get("text_config")
    ends = config.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]


def set_template(folder: Path, template: str) -> None:
    """Writes the chat template, and removes all others, of which programs would take one or another."""
    remove_templates(folder)
    (folder / TEMPLATE).write_text(template, encoding="utf-8")


def has_template(folder: Path) -> bool:
    files = any((folder / name).exists() for name in (TEMPLATE, *_OTHER_TEMPLATES))
    return files or any(read_json(folder / name).get("chat_template") for name in _WITH_TEMPLATES)


def remove_templates(folder: Path) -> None:
    for name in (TEMPLATE, *_OTHER_TEMPLATES):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    for name in _WITH_TEMPLATES:
        settings = read_json(folder / name)
        if settings.pop("chat_template", None) is not None:
            _write_json(folder / name, settings)


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; empty if the file is missing, or holds no such object."""
    try:
        return parse_object(file.read_bytes())
    except OSError:
        return {}


def parse_object(content: bytes) -> dict[str, Any]:
    """Returns a JSON object; empty if ``content`` is none."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
