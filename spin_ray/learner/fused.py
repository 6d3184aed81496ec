"""Weights stored under other names or expert by expert, which the model holds as one tensor.

experts.0.gate_proj.weight  experts.1.gate_proj.weight  …  ─┐
experts.0.up_proj.weight    experts.1.up_proj.weight    …  ─┴─>  experts.gate_up_proj  [experts, 2·width, hidden]
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, rename_source_key

from spin_ray.learner.weights import weight_files

Parts = tuple[tuple[str, ...], ...]
"""Stored tensors of one parameter: parts to join along the rows, each with one name per expert."""


def stored_parts(model: Any, stored: dict[str, tuple[int, ...]]) -> dict[str, Parts]:
    """Returns the stored tensors of parameters that transformers' rules rename or join from experts.

    Parameters with other rules or shapes are left out.
    """
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    renames, joins = _rules(model)
    found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(stored, key=_by_number):
        target, pattern = rename_source_key(name, renames, joins, model.base_model_prefix, parameters)
        if target != name:
            found[target][pattern].append(name)
    parts = {name: _parts(by_pattern, joins) for name, by_pattern in found.items() if name in parameters}
    return {name: part for name, part in parts.items() if part and _shape(part, stored) == parameters[name]}


def stored_targets(model: Any, stored: Iterable[str]) -> set[str] | None:
    """Returns the stored tensors' names in the model; None if transformers splits one of them."""
    parameters = {name: tuple(it.shape) for name, it in model.named_parameters(remove_duplicate=False)}
    renames, joins = _rules(model)
    several = {pattern for rule in joins if len(rule.target_patterns) > 1 for pattern in rule.source_patterns}
    found = [rename_source_key(name, renames, joins, model.base_model_prefix, parameters) for name in stored]
    return None if any(pattern in several for _, pattern in found) else {name for name, _ in found}


def _rules(model: Any) -> tuple[list[Any], list[Any]]:
    rules: list[Any] = get_model_conversion_mapping(model)
    return (
        [rule for rule in rules if not isinstance(rule, WeightConverter)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
    )


def _by_number(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"\.", name)]


def _parts(by_pattern: dict[str | None, list[str]], joins: list[Any]) -> Parts | None:
    if by_pattern.keys() == {None}:
        return (tuple(by_pattern[None]),) if len(by_pattern[None]) == 1 else None
    rule = next((rule for rule in joins if {*rule.source_patterns} == by_pattern.keys()), None)
    if rule is None or [(type(step), step.dim) for step in rule.operations] not in (
        [(MergeModulelist, 0)],
        [(MergeModulelist, 0), (Concatenate, 1)],
    ):
        return None
    return tuple(tuple(by_pattern[pattern]) for pattern in rule.source_patterns)


def _shape(parts: Parts, stored: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    shapes = [stored[part[0]] for part in parts]
    if len(parts) == len(parts[0]) == 1:
        return shapes[0]
    alike = all(stored[name] == shape for part, shape in zip(parts, shapes, strict=True) for name in part)
    if not alike or {len(part) for part in parts} != {len(parts[0])}:
        return None
    return (len(parts[0]), sum(shape[0] for shape in shapes), *shapes[0][1:])


@torch.no_grad()
def read_parts(parameters: dict[str, Tensor], parts: dict[str, Parts], source: Path) -> None:
    """Fills this rank's shard of each parameter; reads only the shard's experts."""
    files = {}
    for path in weight_files(source):
        opened = safe_open(path, "pt")
        files |= dict.fromkeys(opened.keys(), opened)
    for name, parameter in parameters.items():
        local, offset = parameter, (0,) * parameter.ndim
        if isinstance(parameter, DTensor):
            _, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            local = parameter.to_local()
        own = tuple(slice(start, start + size) for start, size in zip(offset, local.shape, strict=True))
        if not local.numel():
            continue
        if local.ndim and len(parts[name]) == len(parts[name][0]) == 1:
            local.copy_(files[parts[name][0][0]].get_slice(parts[name][0][0])[own])
            continue
        for place, expert in enumerate(range(own[0].start, own[0].stop)):
            rows = [files[part[expert]].get_tensor(part[expert]) for part in parts[name]]
            local[place].copy_(torch.cat(rows)[own[1:]])
