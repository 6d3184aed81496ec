"""Ray Train controllers, one after another in one process, because each new process imports torch.

Ray Train's cleaner, another process of each worker group, is not started. The driver itself frees the placement group
of a dead controller, also where no dashboard reports the death. It does not know a group that still waits for
resources.
"""

import asyncio
import math
import os
from contextlib import suppress
from typing import Any

import ray
import ray.cloudpickle
import ray.exceptions
import ray.train
import ray.train.torch
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling.failure_policy import FailureDecision
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spin_ray.errors import StageError, TransientError, UserError, last_line
from spin_ray.runtime.mailbox import Mailbox

_UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")
_idle: dict[tuple[str, str], Any] = {}
"""Idle actor by Ray's ids of its node and job; an actor ends with its job."""
_ANSWERS_WITHIN_S = 60
"""Longest wait for an idle actor, which may have lost its node."""


class Trainer(ray.train.torch.TorchTrainer):
    """A TorchTrainer whose controller's process serves the next trainer, too."""

    def __init__(self, *arguments: Any, mailbox: Mailbox, **named: Any) -> None:
        """Takes the ``mailbox`` that is told of restarts."""
        super().__init__(*arguments, **named)
        self.mailbox = mailbox

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        # First, because the others can take a minute, e.g. to connect the workers.
        return [_NoteGroup(), *(each for each in callbacks if type(each).__name__ not in _UNUSED)]

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        here = ray.get_runtime_context().get_node_id(), ray.get_runtime_context().get_job_id()
        actor = _take(*here)
        try:
            policy = _SaidOnce(self.run_config.failure_config, self.mailbox)
            result = ray.get(actor.run.remote(get_env_vars_to_propagate(), arguments | {"failure_policy": policy}))
        except BaseException:
            with suppress(Exception):  # Ray itself may be gone
                ray.kill(actor)
                _free_group(actor._actor_id.hex())
            raise
        _internal_kv_del(_key(actor._actor_id.hex()))
        _idle[here] = actor
        return result


def said_by(error: BaseException) -> UserError | StageError | None:
    """Returns the error that a worker wrote for the reader, if any did."""
    for failure in getattr(error, "worker_failures", {}).values():
        raised = getattr(failure, "_base_exc", failure)  # Ray wraps it to keep the traceback
        if isinstance(raised, UserError | StageError):
            return raised
    return None


_CUT_OFF = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "ncclRemoteError",
)
"""Words of gloo and NCCL for a rank that has lost another one."""


def own_failure(error: BaseException) -> BaseException:
    """Returns the failure of a worker that did not fail only because another one had."""
    failures: list[BaseException] = list(getattr(error, "worker_failures", {}).values())
    lost_nobody = (failure for failure in failures if not any(words in str(failure) for words in _CUT_OFF))
    return next(lost_nobody, failures[0] if failures else error)


def cause_of(error: BaseException) -> str:
    """Returns what the first failure says in a line, with the type of an error that was not written for the reader."""
    failure = own_failure(error)
    raised, line = getattr(failure, "_base_exc", failure), last_line(failure)
    kind = type(raised).__name__
    is_sentence = isinstance(raised, UserError | StageError) or type(raised).__module__.startswith("ray.")
    return line if is_sentence or f"{kind}:" in line or line == kind else f"{kind}: {line}"


class _SaidOnce(DefaultFailurePolicy):
    """A policy that starts no other workers after an error with a cure: the same would happen after the same work.

    Other restarts, and their causes, are put into the mailbox.
    """

    def __init__(self, failure_config: ray.train.FailureConfig, mailbox: Mailbox) -> None:
        super().__init__(failure_config)
        self._mailbox = mailbox

    def make_decision(self, training_failed_error: ray.train.TrainingFailedError) -> FailureDecision:
        said = said_by(training_failed_error)
        if said and not isinstance(said, TransientError):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)

    def _log_decision(
        self,
        decision: FailureDecision,
        training_failed_error: ray.train.TrainingFailedError,
        error_count: int,
        retry_limit: float,
    ) -> None:
        super()._log_decision(decision, training_failed_error, error_count, retry_limit)
        if decision is FailureDecision.RETRY:
            cause = cause_of(training_failed_error)
            limit = f" of {retry_limit}" if math.isfinite(retry_limit) else ""
            self._mailbox.put_failure(f"train workers failed ({cause}); restart {error_count}{limit}", cause)


class TrainControllers:
    """An actor that runs one controller after another, each in its own environment."""

    def run(self, environment: dict[str, str], arguments: dict[str, Any]) -> ray.train.Result:
        own = {name: os.environ.pop(name, None) for name in environment}
        os.environ.update(environment)
        try:
            controller = TrainController(**arguments)
            asyncio.run(controller.run())
            return controller.get_result()
        finally:
            for name, value in own.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _take(node: str, job: str) -> Any:
    if idle := _idle.pop((node, job), None):
        try:
            ray.get(idle.__ray_ready__.remote(), timeout=_ANSWERS_WITHIN_S)
            return idle
        except ray.exceptions.RayActorError:
            pass
        except ray.exceptions.GetTimeoutError:
            ray.kill(idle)
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(TrainControllers).options(num_cpus=0, scheduling_strategy=here).remote()


class _NoteGroup(WorkerGroupCallback):
    def after_worker_group_start(self, worker_group: Any) -> None:
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        _internal_kv_put(_key(ray.get_runtime_context().get_actor_id()), ray.cloudpickle.dumps(group))


def _free_group(actor: str) -> None:
    noted = _internal_kv_get(_key(actor))
    if noted:
        ray.util.remove_placement_group(ray.cloudpickle.loads(noted))
        _internal_kv_del(_key(actor))


def _key(actor: str | None) -> bytes:
    return f"spin-ray-train-group-{actor}".encode()
