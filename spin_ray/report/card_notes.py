"""Notes of a model card: the start's terms, and how to load the model."""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from spin_ray.learner.published import ends_at, ends_of, parse_object, read_json
from spin_ray.run_dir.artefact import CARD
from spin_ray.run_dir.run_dir import RunDir

_TERMS = ("license", "license_name", "license_link", "language")


def terms_of(start: Path) -> dict[str, Any]:
    """Returns licence and languages from the card of the start model, if it has one."""
    try:
        _, front, _ = (start / CARD).read_text(encoding="utf-8").split("---", 2)
        found = yaml.safe_load(front)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    found = found if isinstance(found, dict) else {}
    return {name: found[name] for name in _TERMS if _is_text(found.get(name))}


def _is_text(value: Any) -> bool:
    return bool(value) and all(isinstance(each, str) for each in (value if isinstance(value, list) else [value]))


def notes_on_loading(run: RunDir, iterate: int, start: Path, *, is_adapter: bool) -> Iterator[str]:
    """Yields what programs that load the model by themselves would get wrong in silence."""
    folder, variables = run.model(iterate).path, run.config().model.chat_template_kwargs
    ends, before = ends_of(_read(run, f"{folder}/generation_config.json")), ends_at(start)
    if start.is_dir() and (added := [end for end in ends if end not in before]):
        yield (
            f"Responses end at {_names(start, added)}, at which the start model did not stop; `eos_token_id` in "
            f"generation_config.json is {ends}." + (_OF_ADAPTERS if is_adapter and not run.config().sft else "")
        )
    if variables:
        yield (
            f"Prompts were written with variables of the chat template: `{_call(variables)}`; "
            f"`vllm serve FOLDER {vllm_option(variables)}`."
        )
    if is_adapter and run.config().sft:
        yield (
            "The folder is an adapter on `sft/model` of its run, which adapter_config.json names by the path of the "
            "run that made it. Export it (`spin-ray export` merges), or pass the base to PEFT yourself if the run has "
            "moved."
        )
    config = read_json(start / "config.json") or _read(run, f"{folder}/config.json")
    if any(scope.get("attn_logit_softcapping") for scope in (config, config.get("text_config") or {})):
        yield (
            "Attention is soft-capped, which SDPA, transformers' default, leaves out: load the model with "
            '`attn_implementation="eager"`.'
        )


_OF_ADAPTERS = " PEFT and vLLM read that file of the base alone: give them these ends."


def vllm_option(variables: Mapping[str, Any]) -> str:
    """Returns the option by which vLLM writes prompts as the run did."""
    return f"--default-chat-template-kwargs {shlex.quote(json.dumps(variables, ensure_ascii=False))}"


def _call(variables: Mapping[str, Any]) -> str:
    named = {name: repr(value) for name, value in variables.items()}
    if all(name.isidentifier() for name in named):
        arguments = ", ".join(f"{name}={value}" for name, value in named.items())
    else:
        arguments = f"**{dict(variables)!r}"
    return f"tokenizer.apply_chat_template(messages, add_generation_prompt=True, {arguments})"


def _names(start: Path, ends: list[int]) -> str:
    added = read_json(start / "tokenizer.json").get("added_tokens") or []
    names = {token.get("id"): f" (`{token.get('content')}`)" for token in added}
    return ", ".join(f"token {end}{names.get(end, '')}" for end in ends)


def _read(run: RunDir, path: str) -> dict[str, Any]:
    return parse_object(run.storage.find(path) or b"")
