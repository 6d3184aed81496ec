"""Start of a run. A finished run imports neither torch nor Ray."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from spin_ray.config.algorithms import facts_of
from spin_ray.config.recipe import SpinConfig
from spin_ray.inputs.check import Inputs, Start, check_architecture, check_recipe, find_inputs
from spin_ray.inputs.model_folder import refuse_pattern
from spin_ray.planning.disk import check_room, parameters_of, use_of_run
from spin_ray.planning.mesh import check_mesh
from spin_ray.planning.rows import rows_at_start
from spin_ray.report.export import export
from spin_ray.report.history import evidence_to_stop, is_evaluated, read_evaluations
from spin_ray.report.probe import read_probe, should_stop
from spin_ray.report.tracking import check_trackers, track_all
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.lease import Lease
from spin_ray.run_dir.names import iterate_name, iterate_number
from spin_ray.run_dir.object_storage import open_storage
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.runtime.engine import StartEngine, VllmEngine
from spin_ray.runtime.gpu_memory import largest_card, memory_here
from spin_ray.runtime.precision import with_precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run."""

    run: RunDir
    model: Path
    """Folder of the newest iterate, on this machine: a model for transformers or vLLM, or with ``train.lora.merge:
    false`` its adapter alone, of which ``export`` makes a model."""
    evaluations: list[dict[str, Any]]
    """``eval.json`` of θ_0, θ_1, …; empty without held-out data."""

    @classmethod
    def of(cls, run: RunDir, config: SpinConfig, inputs: Inputs) -> Self:
        latest = run.model(min(iterate_number(run.latest() or "sft"), config.iterations))
        model = latest.local_folder() if latest.is_committed else inputs.model.path
        return cls(run, model, read_evaluations(run, config))

    def export(self, target: str | Path) -> str:
        """Writes the newest iterate as a whole model with its card; returns the target.

        Args:
            target: a new or empty folder, or ``hub:OWNER/NAME``.

        Raises:
            UserError: as ``spin_ray.export`` does.
        """
        return export(self.run, "latest", target)


def run_spin(config: SpinConfig, out: str | Path, start_engine: StartEngine = VllmEngine) -> RunResult:
    """Runs SPIN, or another ``algorithm``, in the folder ``out``; continues an interrupted run.

    Raises:
        UserError: the recipe, data, model, cluster or folder cannot be used.
        StageError: a stage failed; a second call continues from the committed artefacts.
    """
    with _opened(config, out) as (run, config, inputs):
        if is_finished(run, config) and not _probes_again(run, config, inputs):
            run.begin(config, inputs.facts())
            for model in _models(run, config):
                model.verify()  # a finished run reports damage, too
            track_all(run, config, iterate_number(run.latest() or "sft"))
            logger.info("%s: nothing left to do", run.storage.root)
        else:
            from spin_ray.loop.driver import spin  # slow: torch and Ray

            spin(run, config, _begin(run, config, inputs), start_engine)
        return RunResult.of(run, config, inputs)


def probe_spin(config: SpinConfig, out: str | Path, start_engine: StartEngine = VllmEngine) -> dict[str, Any]:
    """Probes what is left to learn from θ_0's responses; returns the content of ``probe.json``.

    ``run_spin`` can continue in the same folder.

    Raises:
        UserError, StageError: as ``run_spin`` does.
    """
    with _opened(config, out) as (run, config, inputs):
        from spin_ray.loop.driver import look

        return look(run, config, _begin(run, config, inputs), start_engine)


@contextmanager
def _opened(config: SpinConfig, out: str | Path) -> Iterator[tuple[RunDir, SpinConfig, Inputs]]:
    storage = open_storage(out)
    refuse_pattern(storage.root, "--out")
    with Lease(storage, config.storage.lease_timeout_s) as lease:
        run = RunDir(lease.storage)
        begun = run.begun_config()
        inputs = find_inputs(config, check=begun is None)
        yield run, _settle_sizes(with_precision(config, begun), begun, inputs), inputs


def _begin(run: RunDir, config: SpinConfig, inputs: Inputs) -> Start:
    from spin_ray.loop.algorithms.table import check_algorithm, check_machine, find_algorithm
    from spin_ray.runtime.connect import refuse_other_ray

    refuse_other_ray(config)
    check_algorithm(config)
    check_machine(config)
    if run.begun_config():
        check_architecture(config, inputs.model.path)
    else:
        check_trackers(config)  # later, a tracker that fails ends no run
    start = check_recipe(config, inputs, run.date())
    card, memory = largest_card(config), memory_here(config)
    check_mesh(config, start.model.path, card, find_algorithm(config.algorithm), memory=memory)
    _check_room(run, config, start.model.path)
    for finding in start.findings:
        if finding.severity == "warning":
            logger.warning("%s", finding.sentence)
    run.begin(config, start.facts())
    return start


def _check_room(run: RunDir, config: SpinConfig, model: Path) -> None:
    """Warns if the disk of the run may become full; a store has room.

    Raises:
        ResourceError: not even the next model fits.
    """
    if isinstance(run.storage.root, Path):
        use = use_of_run(config, run, parameters_of(model))
        if warning := check_room(use, run.storage.root):
            logger.warning("%s", warning)


def _settle_sizes(config: SpinConfig, begun: SpinConfig | None, inputs: Inputs) -> SpinConfig:
    """Fills in batch sizes that the recipe leaves open. A run that has ``begun`` keeps its sizes."""
    if begun:
        return config.settle_sizes(begun)
    if not config.generation.resources.gpus:
        return config.settle_sizes()
    if inputs.questions and facts_of(config.algorithm).plays_questions:
        one_each = config.data.model_copy(update={"turns": "last", "heldout_fraction": None})  # a question is one row
        return config.settle_sizes(rows=rows_at_start(inputs.questions, one_each))
    return config.settle_sizes(rows=rows_at_start(inputs.train, config.data))


def is_finished(run: RunDir, config: SpinConfig) -> bool:
    latest = run.latest()
    if latest is None and should_stop(config, read_probe(run)):
        return all(model.is_committed for model in _models(run, config))
    if (
        latest is None
        or iterate_number(latest) > config.iterations
        or not all(model.is_committed for model in _models(run, config))
    ):
        return False
    if config.data.holds_out and not all(is_evaluated(run, iterate) for iterate in range(iterate_number(latest) + 1)):
        return False
    at_end = latest == iterate_name(config.iterations)
    return at_end or bool(evidence_to_stop(config, read_evaluations(run, config)))


def _probes_again(run: RunDir, config: SpinConfig, inputs: Inputs) -> bool:
    """Tells whether a probe that stopped the run was one of another recipe, model or data."""
    if run.latest() is not None:
        return False
    return bool(run.differing(config, inputs.facts())) or run.config().at(0) != config.at(0)


def _models(run: RunDir, config: SpinConfig) -> list[Artefact]:
    newest = iterate_number(run.latest() or "sft")
    return [run.model(iterate) for iterate in range(0 if config.sft else 1, newest + 1)]
