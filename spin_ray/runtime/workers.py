"""Runs a function on Ray Train workers that share a torch process group."""

import gc
import logging
import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.cloudpickle
import ray.exceptions
import ray.train
import ray.train.torch

from spin_ray.config.recipe import SpinConfig
from spin_ray.errors import HealthError, StageError, last_line, memory_advice
from spin_ray.runtime import cpu, gpu
from spin_ray.runtime.controllers import Trainer, cause_of, own_failure, said_by
from spin_ray.runtime.garbage import collect_as_usual, skip_imports
from spin_ray.runtime.mailbox import Mailbox, passed_on, warnings_into
from spin_ray.runtime.placement import in_the_cluster, ray_train_asks
from spin_ray.runtime.waiting import wait_until_free, while_it_moves

logger = logging.getLogger(__name__)

_USE_LESS = (
    "lower train.pack_length, set train.gradient_checkpointing, or spread the model over more train.workers "
    "on other nodes"
)

ELASTIC_PLACING_S = 30.0
"""Longest wait for room for an elastic group, in seconds.

Ray notices a lost node within 20 s, but counts nodes again only when workers find no room.
"""


def run_workers(
    function: Callable[[Any], Any],
    job: Any,
    config: SpinConfig,
    name: str,
    folder: str | Path,
    prepare: Callable[[], None] = lambda: None,
    progress: Callable[[], Any] = lambda: None,
    warn: Callable[[str], Any] = logger.warning,
) -> Any:
    """Calls ``function(job)`` on every train worker and returns rank 0's result.

    A dead worker group or controller restarts, up to ``train.max_failures`` times. It may continue from the last
    checkpoint under ``folder/name``. A UserError or StageError of a worker ends the group for good.

    Args:
        name: unique to this piece of work.
        prepare: called before each controller starts.
        progress: returns a value that changes as the work proceeds.
        warn: called with each restart and its cause, and with each warning of a node's first worker: within half a
            minute, with each text once.

    Raises:
        UserError: a worker raised it.
        StageError: a worker raised it, or the workers were not placed in time, failed too often or stood still.
    """
    train = config.train
    wait_until_free(config, "train", f"the train workers for {folder}")
    placing_s = min(train.start_timeout_s, ELASTIC_PLACING_S) if train.min_workers else train.start_timeout_s
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(placing_s)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon Ray sees that workers are done
    with passed_on(warn) as (mailbox, read):
        trainer = _make_trainer(function, job, config, name, folder, mailbox)

        def look() -> Any:
            read()
            return progress()

        try:
            with ray_train_asks(config):
                result = while_it_moves(
                    lambda: _fit(trainer, prepare, train.max_failures),
                    look,
                    train.stall_timeout_s,
                    f"the train workers for {folder} to finish a step",
                )
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            if said := said_by(error):
                raise said from error
            cause, advice = cause_of(error), memory_advice(own_failure(error), _USE_LESS)
            raise StageError(
                f"the train workers for {folder} failed: {cause}{advice}; {_before(mailbox, cause)}{_cluster_now()}"
                "run the command again to go on"
            ) from error
    if isinstance(result, HealthError):
        raise result
    return result


def _make_trainer(
    function: Callable[[Any], Any], job: Any, config: SpinConfig, name: str, folder: str | Path, mailbox: Mailbox
) -> Trainer:
    train, resources = config.train, config.train.resources
    return Trainer(
        _in_worker,
        # As bytes: Ray Train's controller unpickles this too, and would import the modules of the job.
        train_loop_config={
            "call": ray.cloudpickle.dumps((function, job)),
            "threads": resources.threads,
            "precision": train.precision,
            "mailbox": mailbox,
        },
        mailbox=mailbox,
        scaling_config=ray.train.ScalingConfig(
            num_workers=(train.min_workers, train.workers) if train.min_workers else train.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=resources.bundle,
            label_selector=resources.labels or None,
            elastic_resize_monitor_interval_s=train.resize_interval_s,
        ),
        torch_config=ray.train.torch.TorchConfig(backend=_process_group(config), timeout_s=1800),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(
                max_failures=train.max_failures, controller_failure_limit=max(3, train.max_failures)
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            worker_runtime_env={
                "env_vars": gpu.environment(resources.threads, deterministic=train.deterministic)
                if resources.gpus
                else cpu.keep_freed_memory()
            },
        ),
    )


def _process_group(config: SpinConfig) -> str:
    if not config.train.resources.gpus:
        return "gloo"
    # Norms and checkpoints of tensors in CPU memory need gloo.
    return "cpu:gloo,cuda:nccl" if config.train.offload else "nccl"


def _before(mailbox: Mailbox, last: str) -> str:
    """Names the failure before the first restart if the last one had another cause."""
    try:
        first = mailbox.first_failure()
    except Exception:  # Ray itself may be gone
        return ""
    return f"first failure: {first}; " if first not in ("", last) else ""


def _cluster_now() -> str:
    try:
        return f"{in_the_cluster()}; "
    except Exception:
        return ""


def _fit(trainer: Trainer, prepare: Callable[[], None], max_failures: int) -> Any:
    """Restarts a dead controller, as Ray restarts only workers."""
    failures = 0
    while True:
        prepare()
        try:
            return trainer.fit().return_value
        except ray.exceptions.RayActorError as error:
            failures += 1
            if failures > max_failures:
                raise
            cause = last_line(error)
            told = f"the controller of the train workers died ({cause}); restart {failures} of {max_failures}"
            trainer.mailbox.put_failure(told, cause)


def _in_worker(loop: dict[str, Any]) -> Any:
    gc.disable()  # until the imports are done
    cpu.prepare(loop["threads"])
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(loop["threads"])
    gpu.check(device(), loop["precision"])
    function, job = pickle.loads(loop["call"])  # noqa: S301 (from this run's driver, through Ray)
    skip_imports()
    collect_as_usual()
    is_first_here = ray.train.get_context().get_local_rank() == 0
    try:
        with warnings_into(loop["mailbox"]) if is_first_here else nullcontext():
            return function(job)
    except HealthError as error:  # all workers raise it; Ray Train would retry an exception
        return error


def nodes_and_room() -> tuple[tuple[int, ...], int | None]:
    """Returns the node of every rank, and the bytes of the smallest GPU; a collective.

    The bytes are None on CPUs and for one worker.
    """
    import torch
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return (0,), None
    on = device()
    room = torch.cuda.get_device_properties(on).total_memory if on.type == "cuda" else 0
    mine = torch.tensor([ray.train.get_context().get_node_rank(), room], device=on)
    everybody = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, mine)
    nodes, rooms = zip(*(each.tolist() for each in everybody), strict=True)
    return nodes, min(rooms) or None


def device() -> Any:
    return ray.train.torch.get_device()
