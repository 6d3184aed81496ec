"""A process that runs the items of one step, and the parent's side of it.

The child writes JSON lines: ``begin``, ``row``, ``failed``, ``end``. After a CUDA error, a crash or a timeout, the
next item runs in a new process.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gpu_steps.rows import Measure

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "benchmarks/gpu.py"
KILL_AFTER_S = 5


@dataclass(frozen=True, kw_only=True)
class Context:
    tiny: bool
    work: Path


Item = Callable[[Context], Iterator[Measure]]


def module_of(step: str) -> ModuleType:
    return importlib.import_module(f"gpu_steps.{step}")


# The child


def run_items(step: str, items: list[str], context: Context, reply: int) -> None:
    """Runs ``items``; ends the process after an error that leaves the device unusable."""
    pipe = os.fdopen(reply, "w", buffering=1)

    def say(**values: Any) -> None:
        pipe.write(json.dumps(values) + "\n")

    found: dict[str, Item] = module_of(step).ITEMS
    for name in items:
        say(begin=name)
        try:
            for measure in found[name](context):
                say(row=asdict(measure))
        except Exception as error:
            print(f"{step}/{name}:", file=sys.stderr)
            sys.excepthook(type(error), error, error.__traceback__)
            say(failed=reason(error))
            error.__traceback__ = None  # it holds the item's tensors
            if not _device_is_well(context):
                os._exit(3)
        else:
            say(end=name)
        _free_memory(context)


def reason(error: BaseException) -> str:
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _device_is_well(context: Context) -> bool:
    if context.tiny:
        return True
    import torch

    try:
        torch.cuda.synchronize()
        return bool((torch.ones(8, device="cuda") + 1).sum() == 16)
    except Exception:
        return False


def _free_memory(context: Context) -> None:
    import gc

    gc.collect()
    if not context.tiny:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# The parent


@dataclass(kw_only=True)
class Child:
    """One process over some items; ``messages`` yields (item, message) until it ends or its time is up."""

    step: str
    items: list[str]
    context: Context
    log: Path

    def messages(self, deadline: float) -> Iterator[tuple[str, dict[str, Any]]]:
        reader, writer = os.pipe()
        command = [
            sys.executable, PROGRAM, "--child", self.step, "--items", json.dumps(self.items),
            "--work", self.context.work, "--reply", writer, *(["--tiny"] if self.context.tiny else []),
        ]  # fmt: skip
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=log, pass_fds=[writer], env=environment(),
                start_new_session=True,
            )  # fmt: skip
        os.close(writer)
        item = self.items[0]
        over = False
        try:
            for text in lines_until(reader, deadline):
                message = json.loads(text)
                item = message.get("begin", item)
                over = bool({"end", "failed"} & message.keys())
                yield item, message
                if over and item == self.items[-1]:
                    return
        finally:
            late = time.monotonic() >= deadline
            _end(process, wait_s=0 if late else KILL_AFTER_S)
        if not over:
            why = "its time was up" if late else f"the process ended with {process.returncode}; {last_line(self.log)}"
            yield item, {"failed": why}


def lines_until(reader: int, deadline: float) -> Iterator[str]:
    """Yields whole lines until the pipe ends or the deadline has come."""
    kept = b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([pipe], [], [], left)[0]:
                return
            piece = pipe.read(65536)
            if not piece:
                return
            *whole, kept = (kept + piece).split(b"\n")
            yield from (text.decode() for text in whole)


def _end(process: "subprocess.Popen[bytes]", *, wait_s: float) -> None:
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=wait_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(log: Path) -> str:
    lines = [text.strip() for text in log.read_text(errors="replace").splitlines() if text.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def environment() -> dict[str, str]:
    """Returns a child's environment: this checkout comes first, and no hub is asked."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
    }
