"""Generation jobs and their shards."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from spin_ray.config.recipe import SpinConfig, digest
from spin_ray.config.sections import SamplingConfig
from spin_ray.inputs.model_folder import ModelFolder
from spin_ray.run_dir.artefact import Artefact, FileEntry, FoundParts
from spin_ray.run_dir.names import part_name


@dataclass(frozen=True)
class Job:
    prompts: Artefact
    target: Artefact
    model: ModelFolder
    """The model that answers."""
    rows: np.ndarray | None = None
    """Row numbers in ``prompts``, ascending; None: all."""
    samples: int | None = None
    """Responses per prompt; None: ``generation.samples_per_prompt``."""
    sampling: SamplingConfig | None = None
    """Settings of sampling; None: ``generation.sampling``."""
    audit: str | None = None
    """File for the engine's log p of some responses."""

    def inputs(self) -> dict[str, str]:
        return {"prompts": self.prompts.manifest().digest, "opponent": self.model.digest}

    def samples_each(self, config: SpinConfig) -> int:
        return self.samples or config.generation.samples_per_prompt

    def sampled(self, config: SpinConfig) -> SamplingConfig:
        return self.sampling or config.generation.sampling

    def settings(self, config: SpinConfig) -> dict[str, Any]:
        return {
            "seed": config.seed,
            "opponent": self.model.name,
            "samples_per_prompt": self.samples_each(config),
            "shard_rows": config.generation.shard_rows,
            "max_length": config.model.max_length,
            "sampling": self.sampled(config).model_dump(mode="json"),
            "engine": config.generation.engine.model_dump(
                mode="json", exclude={"gpu_memory_utilization", "cpu_kv_cache_gib", "pipeline_parallel_size"}
            ),
            "rows": digest(self.rows.tolist()) if self.rows is not None else "all",
        }


@dataclass(frozen=True)
class Shard:
    """Rows of the prompts, and the part that holds their answers."""

    prompts: Artefact
    target: Artefact
    opponent: str
    """Name of the model that answers, e.g. ``iter_000``."""
    fingerprint: str
    name: str
    samples: int
    sampling: SamplingConfig
    pieces: tuple[tuple[str, FileEntry, tuple[int, ...]], ...]
    """Each is a part of the prompts, its entry, and row numbers within the part."""
    audit: str | None = None
    """The job's ``audit``, in the first shard only."""

    def read_prompts(self) -> pa.Table:
        tables = [
            self.prompts.read_part(name, entry).take(pa.array(rows, pa.int64())) for name, entry, rows in self.pieces
        ]
        return pa.concat_tables(tables)


def prompt_slice(total: int, wanted: int | None, iteration: int, seed: int) -> np.ndarray | None:
    """Returns the iteration's slice of a seeded order, which wraps round; None: all rows."""
    if wanted is None or wanted >= total:
        return None
    order = np.random.default_rng([seed, 0x51]).permutation(total)
    return np.sort(order[(iteration * wanted + np.arange(wanted)) % total])


def cut_into_shards(job: Job, config: SpinConfig) -> list[Shard]:
    """Cuts shards of at most ``shard_rows`` responses, but at least one prompt."""
    files = sorted(job.prompts.manifest().files.items())
    ends = np.cumsum([entry.rows or 0 for _, entry in files])
    rows = job.rows if job.rows is not None else np.arange(ends[-1])
    per_shard = max(1, config.generation.shard_rows // job.samples_each(config))
    fingerprint, samples = _fingerprint(job, config), job.samples_each(config)
    shards = []
    for number, start in enumerate(range(0, len(rows), per_shard)):
        wanted = rows[start : start + per_shard]
        owners = np.searchsorted(ends, wanted, side="right")
        pieces = tuple(
            (*files[owner], tuple((wanted[owners == owner] - (ends[owner] - files[owner][1].rows)).tolist()))
            for owner in np.unique(owners)
        )
        shards.append(
            Shard(
                prompts=job.prompts,
                target=job.target,
                opponent=job.model.name,
                fingerprint=fingerprint,
                name=part_name(number),
                samples=samples,
                sampling=job.sampled(config),
                pieces=pieces,
                audit=None if number else job.audit,
            )
        )
    return shards


def _fingerprint(job: Job, config: SpinConfig) -> str:
    return digest([job.inputs(), job.settings(config)])


def find_parts(job: Job, config: SpinConfig) -> FoundParts:
    """Finds committed shards, and counts damaged ones as missing.

    Raises:
        RunDirError: a shard has other inputs or settings.
    """
    return job.target.find_parts([shard.name for shard in cut_into_shards(job, config)], _fingerprint(job, config))


def row_count(job: Job) -> int:
    return len(job.rows) if job.rows is not None else job.prompts.manifest().rows
