"""Starts a run, or says that nothing is left to do: lease, checks and run.json, then the driver."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from spin_ray.config import SpinConfig
from spin_ray.engine import StartEngine, VllmEngine
from spin_ray.history import read_evaluations
from spin_ray.lease import Lease
from spin_ray.preflight import Inputs, check_recipe, find_inputs
from spin_ray.run_dir import RunDir, iterate_name
from spin_ray.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind."""

    run: RunDir
    model: Path
    """The last iterate, a Hugging Face folder."""
    evaluations: list[dict[str, Any]]
    """``eval.json`` of θ_0, θ_1, …; empty without held-out data."""

    @classmethod
    def of(cls, run: RunDir, config: SpinConfig, inputs: Inputs) -> Self:
        trained = run.model(config.iterations)
        model = run.storage.path(trained.path) if trained.is_committed else inputs.model.path
        return cls(run, model, read_evaluations(run, config))


def run_spin(config: SpinConfig, out: str | Path, start_engine: StartEngine = VllmEngine) -> RunResult:
    """Runs SPIN (Algorithm 1 of arXiv 2401.01335), or another ``algorithm`` of the family, in the folder ``out``, or
    finishes what an earlier call left undone.

    Raises:
        UserError: the recipe, data, model, cluster or folder cannot be used; the message says what to do.
        StageError: a stage failed; the same call goes on from what is committed.
    """
    storage = Storage(out)
    with Lease(storage, config.storage.lease_timeout_s) as lease:
        inputs = find_inputs(config)
        run = RunDir(lease.storage)
        if is_finished(run, config):
            run.begin(config, inputs.facts())
            verify_models(run, config)
            logger.info("%s: nothing left to do", storage.root)
        else:
            from spin_ray.driver import spin  # brings torch and Ray: seconds that a finished run need not wait

            start = check_recipe(config, inputs)
            run.begin(config, start.facts())
            spin(run, config, start, start_engine)
        return RunResult.of(run, config, inputs)


def is_finished(run: RunDir, config: SpinConfig) -> bool:
    """Whether nothing is left to do, told without Ray."""
    last = config.iterations
    evaluated = config.data.heldout is None or run.storage.exists(run.eval_path(last))
    return run.model(last).is_committed and evaluated and run.latest() == iterate_name(last)


def verify_models(run: RunDir, config: SpinConfig) -> None:
    """Recomputes the digests of every iterate's files.

    Raises:
        RunDirError: a file is missing or damaged.
    """
    for iterate in range(0 if config.sft else 1, config.iterations + 1):
        run.model(iterate).verify()
