"""Step 8: a whole run with Ray. transformers generates in vLLM's place, and a train worker is killed once."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from gpu_steps.child import Context, Item
from gpu_steps.rows import Measure

WORKER_TITLE = "RayTrainWorker"


CHECKPOINT_STEPS = 20
"""Steps between checkpoints. Four intervals remain after the first, time enough for the kill on a fast card."""


class TransformersEngine:
    def __init__(self, spec: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._spec, self._device = spec, "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32).to(self._device)

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Any, seeds: Sequence[int], *, audited: int = 0
    ) -> list[Any]:
        import torch

        from spin_ray.runtime.engine import Completion

        stop, answers = self._spec.stop_token_id, []
        for prompt, seed in zip(prompt_ids, seeds, strict=True):
            torch.manual_seed(seed)
            limit = min(sampling.max_tokens, self._spec.max_length - len(prompt))
            ids = torch.tensor([prompt], device=self._device)
            made = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=sampling.temperature, top_k=0,
                max_new_tokens=limit, eos_token_id=stop, pad_token_id=stop,
            )[0, len(prompt) :].tolist()  # fmt: skip
            answers.append(Completion(made, "stop" if made[-1] == stop else "length"))
        return answers

    def close(self) -> None:
        import gc

        import torch

        del self._model
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()


def run(context: Context) -> Iterator[Measure]:
    from spin_ray import run_spin

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    out = context.work / "run"
    killer = _Killer(out)
    started = time.monotonic()
    killer.start()
    with ThreadPoolExecutor(1) as runner:
        running = runner.submit(run_spin, recipe(context), out, start_engine=TransformersEngine)
        running.add_done_callback(lambda _: killer.done.set())
        yield from stages_of(out, running)
        result = running.result()
    yield Measure(id="a run of one iteration", value=time.monotonic() - started, unit="s")
    yield Measure(id="train workers killed", value=killer.killed, unit="", target=">= 1")
    yield Measure(id="iterates evaluated", value=len(result.evaluations), unit="", target=">= 2")
    if not context.tiny:
        import torch

        free, total = torch.cuda.mem_get_info()
        yield Measure(id="memory after the run", value=(total - free) / 1e9, unit="GB in use", target="<= 2")


def stages_of(out: Path, running: Future[Any]) -> Iterator[Measure]:
    """Yields the seconds of each stage once it has ended: a run that is cut short shows how far it came."""
    from spin_ray.run_dir.events import read_events
    from spin_ray.run_dir.storage import Storage

    told, over = 0, False
    while not over:
        over = bool(wait([running], timeout=1).done)
        events = read_events(Storage(out))
        for event in events[told:]:
            if "resumed_at" in event:
                target = f">= {CHECKPOINT_STEPS}"
                yield Measure(
                    id="step that a killed worker went on from", value=event["resumed_at"], unit="", target=target
                )
            if "seconds" in event:
                ended = f"stage {event['stage']}, {event['event']}"
                yield Measure(id=ended, value=event["seconds"], unit="s", note=event.get("error", "")[:200])
        told = len(events)


def recipe(context: Context) -> Any:
    from spin_ray.config.recipe import SpinConfig

    gpus = 0 if context.tiny else 1
    return SpinConfig.model_validate(
        {
            "model": {"path": "embedded:tiny-llama", "max_length": 128},
            "data": {
                "train": "embedded:arithmetic-train", "heldout": "embedded:arithmetic-heldout", "max_rows": 32,
            },
            "iterations": 1,
            "generation": {
                "sampling": {"max_tokens": 8}, "shard_rows": 32, "resources": {"cpus": 1, "gpus": gpus},
            },
            "objective": {"beta": 0.5},
            "train": {
                "workers": 1, "resources": {"cpus": 1, "gpus": gpus}, "learning_rate": 1e-6, "epochs": 25,
                "global_batch_pairs": 8, "pack_length": 256, "precision": "bf16" if gpus else "fp32",
                "checkpoint_every_steps": CHECKPOINT_STEPS,
            },
            "evaluation": {"max_rows": 8},
        }
    )  # fmt: skip


class _Killer(threading.Thread):
    """A thread that kills a train worker once there is a checkpoint to resume from."""

    def __init__(self, run: Path) -> None:
        super().__init__(daemon=True)
        self._run, self.done, self.killed = run, threading.Event(), 0

    def run(self) -> None:
        import psutil

        while not self.killed and not self.done.wait(0.05):
            if not any(map(_has_checkpoint, self._run.glob("**/checkpoint_manager_snapshot.json"))):
                continue
            for process in psutil.Process().children(recursive=True):
                try:
                    if WORKER_TITLE in " ".join(process.cmdline()):
                        process.send_signal(signal.SIGKILL)
                        self.killed += 1
                        break
                except psutil.Error:
                    continue


def _has_checkpoint(snapshot: Path) -> bool:
    try:
        return bool(json.loads(snapshot.read_text())["latest_checkpoint_result"])
    except ValueError:  # it is being written
        return False


ITEMS: dict[str, Item] = {"job": run}
