"""train_log.jsonl: written by rank 0, watched by the driver."""

import json
import threading
from typing import Any

import torch.distributed as dist

from spin_ray.loop.stages.training.job import TrainJob
from spin_ray.report.progress import StageProgress
from spin_ray.report.tracking import set_gauges, step_values
from spin_ray.run_dir.run_dir import RunDir


class TrainLog:
    """Log of rank 0. Steps after the restored checkpoint are removed first."""

    def __init__(self, job: TrainJob, first: int) -> None:
        self._job = job
        self._active = dist.get_rank() == 0
        if self._active:
            logged = job.logged()
            kept = [line for line in logged if line["step"] < first]
            if len(kept) < len(logged):
                lost = {"steps": len(logged) - len(kept), "resumed_at": first, "why": "a worker or the driver died"}
                RunDir(job.storage).event("lost", f"{job.name}/training", **lost)
            job.storage.replace(job.log_path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: dict[str, Any]) -> None:
        if self._active:
            self._job.storage.append(self._job.log_path, json.dumps(line) + "\n")


class Watcher:
    """A thread that shows the logged progress."""

    def __init__(self, job: TrainJob) -> None:
        self._job = job
        self._lines = job.logged()
        self._before = len(self._lines)
        self._progress: StageProgress | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="train-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(1.0)
            self._look()
        if self._progress is not None:
            self._progress.__exit__(None, None, None)

    def _look(self) -> None:
        """Shows the log as it is now. It shrinks when workers go on from a checkpoint."""
        seen, self._lines = self._lines, self._job.logged()
        lines = self._lines
        self._before = min(self._before, len(lines))
        if self._progress is None and lines:
            self._progress = StageProgress(f"{self._job.name}/training", lines[-1]["of"], "steps").__enter__()
        if self._progress is not None:
            own = lines[self._before :]
            tokens, seconds = (sum(line[key] for line in own) for key in ("tokens", "seconds"))
            self._progress.restate(len(lines), self._before, tokens, seconds)
        if lines and lines != seen:
            set_gauges(self._job.storage.name, step_values(lines[-1]))
