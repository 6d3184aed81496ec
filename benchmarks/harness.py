"""Parts that all benchmarks share: pairs of real data, sides that take turns, results on disk."""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Self

import psutil
from where import commit, machine

from spin_ray.config.sections import DataConfig
from spin_ray.inputs.check import versions
from spin_ray.inputs.conversations import conversations_of
from spin_ray.inputs.embedded import resolve
from spin_ray.inputs.rendering import ChatRenderer, Rendered, load_tokenizer
from spin_ray.runtime import cpu

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MODEL = "embedded:smollm2-135m-instruct"
THREADS = 2
"""CPU threads of each side; sides take turns."""


@dataclass(frozen=True)
class Row:
    """One measured answer; ``value`` is a ratio unless ``id`` says otherwise."""

    id: str
    value: float
    target: str
    met: bool
    runs: int
    spread: tuple[float, float]
    note: str = ""


def at_least(name: str, values: Sequence[float], target: float, note: str = "") -> Row:
    """Returns a row: the median of ``values`` should reach ``target``."""
    value = statistics.median(values)
    return Row(name, _short(value), f">= {target:g}", value >= target, len(values), _spread(values), note)


def at_most(name: str, values: Sequence[float], target: float, note: str = "") -> Row:
    """Returns a row: the median of ``values`` should not exceed ``target``."""
    value = statistics.median(values)
    return Row(name, _short(value), f"<= {target:g}", value <= target, len(values), _spread(values), note)


def record(rows: Sequence[Row]) -> None:
    """Prints the rows and writes them to results/bench.json in place of rows with the same ids."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "bench.json"
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    names = {row.id for row in rows}
    where = {"measured": date.today().isoformat(), "commit": commit(), "machine": machine(), "versions": versions()}
    merged = [row for row in kept if row["id"] not in names] + [asdict(row) | where for row in rows]
    file.write_text(json.dumps({"rows": sorted(merged, key=lambda row: row["id"])}, indent=1) + "\n")
    for row in rows:
        met = "met" if row.met else "MISSED"
        print(f"{row.id}: {row.value:g} ({row.spread[0]:g} to {row.spread[1]:g}, {row.runs} runs), {row.target}: {met}")


def pairs_of(data: Path, count: int) -> list[dict[str, list[int]]]:
    """Returns the first ``count`` rows as token ids. y′ is the next row's response: only lengths matter for speed."""
    renderer = ChatRenderer(load_tokenizer(resolve(MODEL)))
    lines = json_lines(data)[:count]
    settings = DataConfig(train=str(data), system="")
    conversations = [found for line in lines for found in conversations_of(json.loads(line), settings)]
    rows = [row for row in renderer.render_all(conversations) if isinstance(row, Rendered)]
    assert len(rows) == count, f"{data}: {count} rows are wanted, {len(rows)} can be used"
    following = [*rows[1:], rows[0]]
    return [
        {"prompt_ids": row.prompt_ids, "real_ids": row.real_ids, "generated_ids": other.real_ids}
        for row, other in zip(rows, following, strict=True)
    ]


def json_lines(file: Path) -> list[str]:
    """Returns the lines of a JSONL file; ``str.splitlines`` also splits at U+2028 and U+0085 within a text."""
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def training_options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_options(parser)
    return parser


def add_training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="rows with messages, one JSON object a line")
    parser.add_argument("--batch", type=int, default=24, help="pairs of a step; TRL takes them 8 at a time")
    parser.add_argument("--pairs", type=int, default=5, help="paired steps, after one that warms up")
    parser.add_argument("--pack-length", type=int, default=1024)
    _add_precision(parser)


def side_options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=Path, required=True, help="JSON file")
    parser.add_argument("--batch", type=int, required=True, help="pairs of a step")
    parser.add_argument("--pack-length", type=int, required=True)
    parser.add_argument("--reply", type=int, required=True)
    _add_precision(parser)
    return parser


def side_command(name: str, pairs: Path, options: argparse.Namespace, *more: object) -> list[str]:
    """Returns the command of a side, from its benchmark's ``training_options``."""
    command = [
        sys.executable, HERE / "sides" / f"{name}.py", "--pairs", pairs, "--batch", options.batch,
        "--pack-length", options.pack_length, "--precision", options.precision, *more,
    ]  # fmt: skip
    return [str(part) for part in command]


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16", help="of both sides' products")


REFERENCE_TOLERANCE = {"fp32": 0.05, "bf16": 4.0}
"""Largest difference, in nats, of a response's reference log-probability between sides that batch differently.

In bf16 (8 bits of mantissa) a token's log-probability carries about 0.03; responses have some hundred tokens.
"""
LOSS_TOLERANCE = {"fp32": 0.005, "bf16": 0.03}


class Side:
    """A process that works when it is told to, so that two sides take turns on the same cores.

    It reads a number a line from stdin and answers with a JSON line on its own pipe.
    """

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        reader, writer = os.pipe()
        self.name = name
        self.peak_pss_mib = 0.0
        self._log = (RESULTS / f".{name}.log").open("wb")
        self._process = subprocess.Popen(
            [*command, "--reply", str(writer)],
            stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, pass_fds=[writer], text=True,
            env=os.environ | (environment or {}),
        )  # fmt: skip
        os.close(writer)
        self._replies = os.fdopen(reader)
        self._done = threading.Event()
        threading.Thread(target=self._watch_memory, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def ready(self) -> dict[str, Any]:
        """Returns the next answer of the side; the first comes once it has loaded everything.

        Raises:
            RuntimeError: the side ended.
        """
        line = self._replies.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended; {self._log.name} has what it said")
        return json.loads(line)

    def turn(self, number: int) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return self.ready()

    def _watch_memory(self) -> None:
        while not self._done.wait(0.5):
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(self._process.pid)
                family = [root, *root.children(recursive=True)]
                self.peak_pss_mib = max(
                    self.peak_pss_mib, sum(process.memory_full_info().pss for process in family) / 2**20
                )


def check_references(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], precision: str) -> None:
    """Checks that both sides' reference log-probabilities agree within ``REFERENCE_TOLERANCE``."""
    differences = [
        abs(mine - yours)
        for pair, other in zip(ours, theirs, strict=True)
        for mine, yours in zip(pair, other, strict=True)
    ]
    print(f"largest difference of a reference log-probability: {max(differences):.2g} nats")
    assert max(differences) < REFERENCE_TOLERANCE[precision], "both sides must score the same tokens alike"


def prepare() -> None:
    """Makes the CPU settings that all sides inherit."""
    RESULTS.mkdir(exist_ok=True)
    cpu.prepare(THREADS)


def replies(reply: int) -> tuple[Any, Iterator[int]]:
    """Returns, for a side's script, a function that answers, and the numbers from stdin."""
    pipe = os.fdopen(reply, "w", buffering=1)

    def answer(**values: Any) -> None:
        pipe.write(json.dumps(values) + "\n")

    return answer, (int(line) for line in sys.stdin)


def peak_mib() -> float:
    """Returns the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def timed() -> Iterator[dict[str, float]]:
    spent: dict[str, float] = {}
    started = time.perf_counter()
    yield spent
    spent["seconds"] = time.perf_counter() - started


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return _short(min(values)), _short(max(values))


def _short(value: float) -> float:
    return float(f"{value:.3g}")
