"""The recipe of one run: settings, impossible combinations, and identity."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from math import ceil
from typing import Any, Self, TypeVar, get_args

from pydantic import model_validator

from spin_ray.config.algorithms import facts_of
from spin_ray.config.limits import limit_problems
from spin_ray.config.sections import (
    IDENTITY,
    MAY_CHANGE,
    BackendName,
    EngineConfig,
    GenerationConfig,
    Mesh,
    Section,
    Settings,
    sources_of,
)

T = TypeVar("T")


class SpinConfig(Settings):
    """The recipe of one run, checked for impossible combinations."""

    @model_validator(mode="after")
    def _combinations_are_possible(self) -> Self:
        if problems := list(_impossible(self)):
            raise ValueError("\n".join(problems))
        return self

    def with_train(self, **changes: Any) -> Self:
        """Returns a copy with other settings of ``train``, unchecked."""
        return self.model_copy(update={"train": self.train.model_copy(update=changes)})

    def settle_precision(self, other: SpinConfig) -> Self:
        """Returns a copy in which ``other``'s precision replaces ``auto``."""
        return self if self.train.precision != "auto" else self.with_train(precision=other.train.precision)

    def settle_sizes(self, begun: SpinConfig | None = None, rows: int | None = None) -> Self:
        """Returns a copy with ``max_num_seqs`` and ``shard_rows`` where the recipe leaves them open.

        Args:
            begun: recipe of a run that goes on, whose sizes stay.
            rows: number of training rows, if known.
        """
        generation = begun.generation if begun else _sized(self, rows)
        engine = self.generation.engine
        if "max_num_seqs" not in engine.model_fields_set:
            seats, tokens = generation.engine.max_num_seqs, engine.extra.get("max_num_batched_tokens")
            seats = min(seats, tokens) if isinstance(tokens, int) else seats  # a batch has a token of each
            engine = engine.model_copy(update={"max_num_seqs": seats})
        open_ones: dict[str, Any] = {"engine": engine}
        if "shard_rows" not in self.generation.model_fields_set:
            open_ones["shard_rows"] = generation.shard_rows
        return self.model_copy(update={"generation": self.generation.model_copy(update=open_ones)})

    def resolve_dtype(self, engine: EngineConfig) -> EngineConfig:
        """Returns a copy in which training's dtype replaces ``auto``."""
        if engine.dtype != "auto":
            return engine
        return engine.model_copy(update={"dtype": "bfloat16" if self.train.precision == "bf16" else "float32"})

    @property
    def longest_tree(self) -> int:
        """Tokens of the longest prompt with both responses."""
        return self.model.max_length + self.generation.sampling.max_tokens

    @property
    def commits_adapters(self) -> bool:
        """True if an iteration commits only its adapter."""
        return self.train.lora is not None and not self.train.lora.merge

    def mixes_references(self, iteration: int) -> bool:
        """Returns True if an iteration's reference is that of α-SPIN: in iteration 0 the opponent is θ_0 itself."""
        return self.objective.reference_alpha < 1 and iteration > 0

    def at(self, iteration: int) -> IterationSettings:
        return IterationSettings(
            beta=_pick(self.objective.beta, iteration),
            learning_rate=_pick(self.train.learning_rate, iteration),
            epochs=_pick(self.train.epochs, iteration),
            schedule_epochs=_pick(self.train.schedule_epochs, iteration),
        )

    def margin_beta(self, iteration: int) -> float:
        """Returns the factor of reported margins: β, but 1 for SPPO, whose β is 1/η and no scale of margins."""
        return self.at(iteration).beta if facts_of(self.algorithm).beta_scales_margins else 1.0

    def identity(self) -> dict[str, Any]:
        """Returns ``{"section.field": value}`` of all settings but those marked ``MayChange``."""
        return flatten(_identity(self))


GPU_SEATS, GPU_SHARD_ROWS = 512, 4096
"""Default sizes on GPUs: most responses that are decoded together, and in a shard."""


def _sized(config: SpinConfig, rows: int | None) -> GenerationConfig:
    """Returns sizes for the device. If the rows are known, engines get equally many shards of equal length."""
    generation = config.generation
    if not generation.resources.gpus:
        return GenerationConfig()
    shard_rows = GPU_SHARD_ROWS
    known = [count for count in (rows, config.data.max_rows, config.data.prompts_per_iteration) if count]
    if known:
        each = ceil(min(known) / generation.replicas) * generation.samples_per_prompt
        shard_rows = ceil(each / ceil(each / GPU_SHARD_ROWS))
    return GenerationConfig(shard_rows=shard_rows, engine=EngineConfig(max_num_seqs=GPU_SEATS))


def _identity(section: Section) -> dict[str, Any]:
    tree = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if MAY_CHANGE in field.metadata:
            del tree[name]
        elif isinstance(value, Section) and IDENTITY not in field.metadata:
            tree[name] = _identity(value)
    return tree


class IterationSettings(Section):
    beta: float
    learning_rate: float
    epochs: int
    schedule_epochs: int | None = None


_CREDENTIALS = re.compile(r"://[^/]*:[^/]*@|[?&][^=]*(secret|token|passw|access_key)[^=]*=", re.IGNORECASE)
_DATABASE_PASSWORD = re.compile(r"://[^/:@]*:[^@]*@")
"""A password of SQLAlchemy's, which may have slashes."""
_VARIABLE = re.compile(r"(^|/)\$(\{\w+\}|[A-Za-z_]\w*)(/|$)")


def _pick(value: T | tuple[T, ...], iteration: int) -> T:
    return value[iteration] if isinstance(value, tuple) else value


def _impossible(config: SpinConfig) -> Iterator[str]:
    yield from (lists := list(_list_problems(config)))
    if not lists:
        yield from _objective_problems(config)
    yield from _length_problems(config)
    yield from _resource_problems(config)
    yield from _mesh_problems(config)
    yield from _deepspeed_problems(config)
    yield from _address_problems(config)
    yield from _adapter_problems(config)
    yield from _optimizer_problems(config)
    yield from limit_problems(config)
    if config.data.heldout is not None and config.data.heldout_fraction is not None:
        yield "data.heldout_fraction: holds rows of data.train out, and data.heldout names others; leave one out"
    if config.data.heldout_fraction and config.evaluation.max_rows and isinstance(config.data.train, tuple):
        yield "evaluation.max_rows: data.train is a list of sources; lower data.heldout_fraction in its place"
    votes = facts_of(config.algorithm).reads_numbers
    if config.evaluation.answer_extractor != "none" and not config.data.holds_out and not votes:
        yield "evaluation.answer_extractor: needs data.heldout or data.heldout_fraction"
    if config.evaluation.grade != "number":
        if not config.data.holds_out:
            yield "evaluation.grade: needs data.heldout or data.heldout_fraction"
        if config.evaluation.answer_extractor != "none" and not votes:
            yield "evaluation.answer_extractor: reads numbers, which evaluation.grade does not grade; leave it out"
    for limit, name, sources in (
        ("data.max_rows", "train", config.data.train), ("data.max_rows", "questions", config.data.questions),
        ("evaluation.max_rows", "heldout", config.data.heldout),
    ):  # fmt: skip
        given = config.evaluation.max_rows if name == "heldout" else config.data.max_rows
        if given is not None and isinstance(sources, tuple):
            yield f"{limit}: data.{name} is a list of sources; give them rows of their own, or weights"
    yield from _greedy_problems(config)
    if config.evaluation.samples > 1:
        if not config.data.holds_out:
            yield "evaluation.samples: needs data.heldout or data.heldout_fraction"
        elif config.evaluation.grade == "number" and config.evaluation.answer_extractor == "none":
            yield "evaluation.samples: only grading reads more than one; give answer_extractor or grade"
    if config.stop_when is not None and not config.data.holds_out:
        yield "stop_when: patience and min_fall need data.heldout or data.heldout_fraction"
    for place, engine, own in (
        ("generation", config.generation.engine, _OWN_ARGUMENTS | _OF_GENERATION),
        ("serving", config.serving.engine, _OWN_ARGUMENTS),
    ):
        for key in sorted(own & engine.extra.keys() if engine else ()):
            cure = "use the field of its own" if key in EngineConfig.model_fields else "leave it out"
            yield f"{place}.engine.extra.{key}: is set by spin_ray; {cure}"


def _greedy_problems(config: SpinConfig) -> Iterator[str]:
    sampling = config.generation.sampling
    if sampling.temperature and sampling.top_k != 1:
        return
    name, value = ("top_k", 1) if sampling.temperature else ("temperature", 0)
    for setting, samples in (
        ("generation.samples_per_prompt", config.generation.samples_per_prompt),
        ("evaluation.samples", config.evaluation.samples if config.data.holds_out else 1),
    ):
        if samples > 1:
            yield f"{setting}: with generation.sampling.{name} {value} all {samples} samples are the same; give 1"


_OWN_ARGUMENTS = {
    "model", "dtype", "max_model_len", "generation_config", "trust_remote_code", "load_format", "config_format",
    "tensor_parallel_size", "pipeline_parallel_size", "max_num_seqs", "gpu_memory_utilization", "enforce_eager",
}  # fmt: skip
"""Arguments of vLLM that spin_ray sets for every engine."""
_OF_GENERATION = {
    "tokenizer", "seed", "skip_tokenizer_init", "enable_prefix_caching", "logprobs_mode", *EngineConfig.model_fields
}  # fmt: skip
"""Further arguments set for generation, on which exact samples depend."""


def _list_problems(config: SpinConfig) -> Iterator[str]:
    for name, value in [
        ("objective.beta", config.objective.beta),
        ("train.learning_rate", config.train.learning_rate),
        ("train.epochs", config.train.epochs),
        ("train.schedule_epochs", config.train.schedule_epochs),
    ]:
        if isinstance(value, tuple) and len(value) != config.iterations:
            yield f"{name}: has {len(value)} values for {config.iterations} iterations; give one value or one for each"


def _objective_problems(config: SpinConfig) -> Iterator[str]:
    objective, train = config.objective, config.train
    lists = any(isinstance(value, tuple) for value in (objective.beta, train.epochs, train.schedule_epochs))
    every = range(config.iterations if lists else 1)  # one value is that of all iterations
    if objective.loss == "space" and any(_pick(objective.beta, iteration) != 1 for iteration in every):
        yield "objective.beta: the loss space takes log-ratios as they are; give 1"
    for epochs, planned in ((_pick(train.epochs, it), _pick(train.schedule_epochs, it)) for it in every):
        if planned is not None and planned < epochs:
            yield f"train.schedule_epochs: {planned} is less than the {epochs} of train.epochs"
            break


def _length_problems(config: SpinConfig) -> Iterator[str]:
    if config.generation.sampling.max_tokens >= config.model.max_length:
        yield (
            f"generation.sampling.max_tokens: {config.generation.sampling.max_tokens} leaves no room for a prompt "
            f"within model.max_length {config.model.max_length}; lower it or raise max_length"
        )
    if config.train.pack_length < config.longest_tree:
        yield (
            f"train.pack_length: {config.train.pack_length} cannot hold a prompt with both responses; raise it to "
            f"{config.longest_tree} (model.max_length + generation.sampling.max_tokens) or lower those"
        )


def _resource_problems(config: SpinConfig) -> Iterator[str]:
    engine, gpus = config.generation.engine, config.generation.resources.gpus
    sizes = f"tensor_parallel_size {engine.tensor_parallel_size}"
    if engine.pipeline_parallel_size > 1:
        sizes += f" × pipeline_parallel_size {engine.pipeline_parallel_size}"
    if gpus and (gpus >= 1 or engine.devices > 1) and gpus != engine.devices:
        yield f"generation.resources.gpus: {gpus:g} must equal generation.engine.{sizes}"
    if not gpus and engine.devices > 1:
        name, _, size = sizes.partition(" ")
        yield f"generation.engine.{name}: {size} needs generation.resources.gpus: {engine.devices}"
    if 1 < config.serving.max_replicas < config.serving.replicas:
        yield f"serving.max_replicas: {config.serving.max_replicas} is fewer than serving.replicas"
    if config.train.resources.gpus not in (0, 1):
        yield f"train.resources.gpus: {config.train.resources.gpus:g}; a train worker drives exactly one GPU, or none"
    for field, most, least in [
        ("train.min_workers", config.train.workers, config.train.min_workers),
        ("generation.min_replicas", config.generation.replicas, config.generation.min_replicas),
    ]:
        if least is not None and least > most:
            yield f"{field}: {least} is more than the {most} of {field.replace('min_', '')}"
    if config.train.min_workers is not None and config.train.backend == "deepspeed":
        yield (
            "train.min_workers: a checkpoint of DeepSpeed needs the number of workers that wrote it; "
            "leave min_workers out or use train.backend: fsdp2"
        )


def _mesh_problems(config: SpinConfig) -> Iterator[str]:
    train = config.train
    if not isinstance(train.mesh, Mesh):
        return
    if train.backend == "deepspeed":
        yield "train.mesh: is for train.backend: fsdp2; DeepSpeed shards over all workers; leave it out"
    if train.mesh.ranks != train.workers:
        yield f"train.mesh: {train.mesh} has {train.mesh.ranks} ranks for train.workers {train.workers}"
    if train.min_workers is not None and train.min_workers != train.workers:
        yield "train.mesh: has fixed sizes, and an elastic group may be smaller; use auto or leave min_workers out"
    if train.mesh.tensor > 1 and train.lora is not None:
        yield "train.mesh.tensor: layers with adapters (train.lora) cannot be split; use shard in its place"
    if train.mesh.tensor > 1 and train.compile is True:
        yield "train.compile: layers that are split (train.mesh.tensor) cannot be compiled; leave it out"


def _deepspeed_problems(config: SpinConfig) -> Iterator[str]:
    if config.train.backend != "deepspeed":
        return
    if config.train.compile is True:
        yield "train.compile: is for train.backend: fsdp2; leave it out"
    if config.train.reduce_every_pack is False:
        yield "train.reduce_every_pack: DeepSpeed sums gradients after each pack; leave it out"


def _optimizer_problems(config: SpinConfig) -> Iterator[str]:
    for place, section in config.trainings.items():
        name = section.optimizer.name
        if name == "muon" and config.train.backend == "deepspeed":
            yield f"{place}.optimizer.name: muon needs train.backend: fsdp2; DeepSpeed flattens the matrices"
        if name == "muon" and not (place == "train" and config.train.lora):
            yield f"{place}.optimizer.name: muon trains matrices only; use it with train.lora, or take adamw"
        if name == "adamw_8bit" and (config.train.workers > 1 or config.train.backend != "fsdp2"):
            yield (
                f"{place}.optimizer.name: adamw_8bit needs train.workers: 1 and train.backend: fsdp2; take adamw, "
                "whose state is sharded"
            )


def _adapter_problems(config: SpinConfig) -> Iterator[str]:
    lora, backend = config.train.lora, config.train.backend
    if lora is None:
        return
    if lora.is_quantised and lora.merge:
        yield (
            f"train.lora.base: {lora.base} needs train.lora.merge: false; a merged model would not be the one trained"
        )
    if lora.is_quantised and backend != "fsdp2":
        yield f"train.lora.base: {lora.base} needs train.backend: fsdp2"
    if not lora.merge and backend not in get_args(BackendName):
        yield f"train.lora.merge: false needs train.backend: {' or '.join(get_args(BackendName))}"
    if not lora.merge and lora.rank > LARGEST_RANK:
        yield f"train.lora.rank: {lora.rank} is more than the {LARGEST_RANK} that vLLM serves; lower it, or merge: true"


LARGEST_RANK = 512
"""Largest adapter rank that vLLM loads."""


def _address_problems(config: SpinConfig) -> Iterator[str]:
    for name, uri in [
        ("model.path", config.model.path),
        ("model.base", config.model.base),
        ("scorer.path", config.scorer.path if config.scorer else None),
        *(("data.train", source.path) for source in sources_of(config.data.train)),
        *(("data.heldout", source.path) for source in sources_of(config.data.heldout)),
        *(("data.questions", source.path) for source in sources_of(config.data.questions)),
    ]:  # fmt: skip
        if uri and _CREDENTIALS.search(uri):
            yield f"{name}: holds credentials, which would be written to run.json; give them by environment variables"
        elif uri and _VARIABLE.search(uri):
            yield f"{name}: {uri}: recipes read no variables; write the path, or give --{name}=… on the command line"
    mlflow = config.tracking.mlflow.uri if config.tracking.mlflow else None
    for name, url, variables in [
        ("serving.votes", config.serving.votes, "PGPASSWORD, or MySQL's ?read_default_file=…"),
        (
            "tracking.mlflow.uri",
            mlflow,
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; a database: PGPASSWORD",
        ),
    ]:
        if url and (_CREDENTIALS.search(url) or _DATABASE_PASSWORD.search(url)):
            yield f"{name}: holds a password, which run.json would show; give it by the environment ({variables})"
    for place, engine in (("generation", config.generation.engine), ("serving", config.serving.engine)):
        if engine and "hf_token" in engine.extra:
            yield f"{place}.engine.extra.hf_token: would be written to run.json; give it by $HF_TOKEN"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns ``{"a.b": 1}`` for ``{"a": {"b": 1}}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def is_within(place: str, others: Iterable[str]) -> bool:
    """Tells whether a setting is one of the others, or a field of one."""
    return any(f"{place}.".startswith(f"{other}.") for other in others)


def digest(value: Any) -> str:
    """Returns the SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
