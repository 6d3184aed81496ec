"""The engine's own log p of the opponent's responses beside that of the model that is trained."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from spin_ray.config.recipe import SpinConfig
from spin_ray.config.sections import LoraConfig
from spin_ray.errors import HealthError, RunDirError
from spin_ray.inputs.embedded import resolve
from spin_ray.learner.backends.base import BackendSettings
from spin_ray.learner.backends.fsdp2 import Fsdp2Backend
from spin_ray.learner.step import PackShape
from spin_ray.loop.stages.training.audit import audit_engine
from spin_ray.run_dir.schemas import AUDIT_SCHEMA
from spin_ray.run_dir.storage import Storage, table_to_bytes
from tests.support.fakes import config_of
from tests.support.learner_cases import logp_alone, one_rank

TINY = resolve("embedded:tiny-llama")
RESPONSES = [([3, 4, 5], [6, 7, 2]), ([3, 4, 5], [8, 2]), ([9], [10, 11, 12, 13])]
TOKENS = 9
SETTINGS = BackendSettings(precision="fp32", attention="auto", max_length=64)


@dataclass
class Job:
    """What the audit reads of a TrainJob."""

    storage: Storage
    name: str = "iter_000"
    backend: BackendSettings = SETTINGS
    audit: str | None = "iter_000/engine_audit.parquet"
    recipe: SpinConfig = field(default_factory=config_of)
    shape: PackShape = field(default_factory=lambda: PackShape(pack_length=64, global_batch_pairs=2, pad_id=0))


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    with one_rank(tmp_path_factory.mktemp("rank")):
        yield Fsdp2Backend(TINY, SETTINGS, torch.device("cpu"))


@pytest.fixture(scope="module")
def logps() -> list[float]:
    """log p of each response, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        return [float(logp_alone(model, prompt, response)) for prompt, response in RESPONSES]


def told(folder: Path, logps: list[float], **more: Any) -> Job:
    """Returns a job whose engine gave its responses these log p."""
    job = Job(Storage(folder), **more)
    rows = [
        {"prompt_ids": prompt, "token_ids": response, "engine_logp": logp}
        for (prompt, response), logp in zip(RESPONSES, logps, strict=True)
    ]
    assert job.audit
    job.storage.replace(job.audit, table_to_bytes(pa.Table.from_pylist(rows, AUDIT_SCHEMA)))
    return job


def test_an_engine_of_the_same_model_agrees(backend, tmp_path, logps):
    found = audit_engine(told(tmp_path, logps), backend)
    assert found["engine_difference"] == pytest.approx(0, abs=1e-5)


def test_differences_do_not_cancel_and_are_per_token(backend, tmp_path, logps):
    apart = [logps[0] + 0.3, logps[1] - 0.3, logps[2]]
    assert audit_engine(told(tmp_path, apart), backend)["engine_difference"] == pytest.approx(0.6 / TOKENS, abs=1e-5)


@pytest.mark.parametrize("wrong", [1.0, -1.0, float("nan")])
def test_an_engine_of_another_model_stops_training_before_it_begins(backend, tmp_path, logps, wrong):
    apart = [logp + wrong * len(tokens) for logp, (_, tokens) in zip(logps, RESPONSES, strict=True)]
    with pytest.raises(HealthError, match=r"differ by (1|nan) nats a token \(3 responses\).*max_engine_difference 0.1"):
        audit_engine(told(tmp_path, apart), backend)
    without = config_of(health={"max_engine_difference": None})
    noted = audit_engine(told(tmp_path, apart, recipe=without), backend)
    assert noted == ({} if math.isnan(wrong) else {"engine_difference": pytest.approx(1, abs=1e-5)})


def test_a_base_that_is_rounded_for_training_alone_is_only_noted(backend, tmp_path, logps):
    rounded = replace(SETTINGS, lora=LoraConfig(rank=4, base="nf4", merge=False))
    job = told(tmp_path, [logp + 9 for logp in logps], backend=rounded)
    assert audit_engine(job, backend)["engine_difference"] == pytest.approx(3, abs=1e-4)
    with pytest.raises(HealthError, match="differ by nan"):
        audit_engine(told(tmp_path, [math.nan] * 3, backend=rounded), backend)


def test_a_damaged_file_is_named(backend, tmp_path, logps):
    job = told(tmp_path, logps)
    assert job.audit
    whole = job.storage.read(job.audit)
    for broken in (whole[:-9], whole[:20] + bytes(40) + whole[60:]):
        job.storage.replace(job.audit, broken)
        with pytest.raises(RunDirError, match=r"engine_audit.parquet: is damaged; remove it"):
            audit_engine(job, backend)


def test_nothing_is_said_where_the_engine_told_nothing(backend, tmp_path):
    """An algorithm without an opponent, a removed file (it is warned of), an engine that knows no log p."""
    assert audit_engine(Job(Storage(tmp_path), audit=None), backend) == {}
    assert audit_engine(Job(Storage(tmp_path)), backend) == {}
    job = Job(Storage(tmp_path))
    assert job.audit
    job.storage.replace(job.audit, table_to_bytes(AUDIT_SCHEMA.empty_table()))
    assert audit_engine(job, backend) == {}
