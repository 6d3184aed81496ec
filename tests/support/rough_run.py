"""A run on a small cluster whose processes are killed at random moments."""

import hashlib
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from spin_ray.run_dir.artefact import Manifest
from spin_ray.run_dir.events import lost_work, read_json_lines
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.run_dir.storage import MANIFEST, Storage
from tests.support.killable_cluster import KillableCluster
from tests.support.program import ROOT, SPIN_RAY, environment, micro_recipe, spin_ray, write_recipe

PLAYING, TRAINING = "generation", "training"
PHASE = {"generation actor": PLAYING, "engine": PLAYING, "train worker": TRAINING, "controller": TRAINING}
KINDS = (*PHASE, "node", "head", "driver")
"""Kinds that can be killed; the last three in either phase."""
CHECKPOINT_EVERY, REPLICAS = 4, 2
SHARDS, STEPS = 6, 96
LIMIT_S = 600.0
"""Longest wait for the next moment, or for a driver without a cluster to end."""


def recipe() -> dict[str, Any]:
    """Returns a repeatable recipe (fp32) that is slow enough for kills: two engines, two workers, ``STEPS``."""
    content = micro_recipe()
    content["generation"] |= {"replicas": REPLICAS, "resources": {"cpus": 1}, "sampling": {"max_tokens": 60}}
    content["generation"]["engine"] |= {"max_num_seqs": 1, "extra": {"distributed_executor_backend": "mp"}}
    content["train"] |= {"workers": 2, "epochs": 8, "pack_length": 192, "checkpoint_every_steps": CHECKPOINT_EVERY}
    return content


@dataclass
class Kill:
    kind: str
    phase: str
    after: int
    """Shards or steps that were done by then."""
    same_command: bool = False
    """True: the driver ended and was started again; False: the run went on without help."""
    shards: int = 0
    steps: int = 0
    """Shards and steps that were lost and repeated, by events.jsonl."""


def plan(kinds: Sequence[str], chance: random.Random) -> list[Kill]:
    phases = [PHASE.get(kind) or chance.choice((PLAYING, TRAINING)) for kind in kinds]
    kills = []
    for phase, last in ((PLAYING, SHARDS // 2), (TRAINING, STEPS // 2)):
        here = [kind for kind, of in zip(kinds, phases, strict=True) if of == phase]
        chance.shuffle(here)
        moments = sorted(chance.sample(range(last), len(here)))
        kills += [Kill(kind, phase, moment) for kind, moment in zip(here, moments, strict=True)]
    return kills


class RoughRun:
    def __init__(self, recipe_file: Path, out: Path, chance: random.Random) -> None:
        self._recipe, self._out, self._chance = recipe_file, out, chance
        self._driver: subprocess.Popen[bytes] | None = None
        self._cluster = KillableCluster()
        self._told = {"shards": 0, "steps": 0}
        self._victims: list[psutil.Process] = []

    def to_the_end(self, kills: list[Kill]) -> None:
        """Kills as planned; starts the driver again, by the same command, when it ended with an error."""
        with self._log.open("wb"), self._cluster:
            try:
                self._start()
                last = None
                for kill in kills:
                    self._go_on_until(lambda kill=kill: self._is_time_for(kill), last)
                    self._kill(kill.kind)
                    last = kill
                self._go_on_until(lambda: self._driver.poll() == 0, last)
            finally:
                self._end_driver()

    def _tell(self, kill: Kill) -> None:
        lost = lost_work(RunDir(Storage(self._out)).events())
        kill.shards, kill.steps = lost["shards"] - self._told["shards"], lost["steps"] - self._told["steps"]
        self._told = lost
        print(kill, flush=True)

    @property
    def _log(self) -> Path:
        return self._out.with_suffix(".log")

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._driver = subprocess.Popen(
                [*SPIN_RAY, "run", str(self._recipe), "--out", str(self._out)],
                env=environment() | self._cluster.environment, cwd=ROOT, stdout=log, stderr=log,
            )  # fmt: skip

    def _end_driver(self) -> None:
        self._driver.kill()
        self._driver.wait(timeout=30)

    def _go_on_until(self, moment: Callable[[], bool], last: Kill | None) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not moment():
            ended = self._driver.poll()
            if ended:
                assert last is not None, f"failed though nothing was killed: {self._log.read_text()[-2000:]}"
                last.same_command = True
                if not self._cluster.is_alive:
                    self._cluster.start()
                self._start()
            assert ended != 0, "the run ended before the next kill"
            assert time.monotonic() < deadline, f"waited {LIMIT_S:.0f} s; {self._log.read_text()[-2000:]}"
            time.sleep(0.02)
        if last is not None:
            self._tell(last)

    def _is_time_for(self, kill: Kill) -> bool:
        if kill.phase == PLAYING:
            so_far = len(list((self._out / "iter_000/generations").glob("part-*")))
        else:
            log = self._out / "iter_000/train_log.jsonl"
            so_far = len(log.read_bytes().splitlines()) if log.exists() else 0
        if so_far < kill.after or not self._cluster.is_alive:
            return False
        self._victims = self._cluster.processes(kill.kind) if kill.kind in PHASE else []
        return kill.kind not in PHASE or bool(self._victims)

    def _kill(self, kind: str) -> None:
        if kind == "node":
            self._cluster.kill_a_node()
        elif kind == "head":
            self._cluster.kill_the_head()
        elif kind == "driver":
            self._driver.kill()
        else:
            self._chance.choice(self._victims).kill()


def committed(out: Path) -> dict[str, str]:
    found = {}
    for manifest in out.rglob(MANIFEST):
        if ".attempts" not in manifest.parts:
            for name in Manifest.from_bytes(manifest.read_bytes()).files:
                path = manifest.parent / name
                found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run_calmly(folder: Path) -> dict[str, str]:
    """Returns what is committed when nothing is killed, on a Ray of its own."""
    finished = spin_ray("run", write_recipe(folder, recipe()), "--out", folder / "run", "--cluster.local_cpus=2")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return committed(folder / "run")


def run_roughly(folder: Path, calm: dict[str, str], kinds: Sequence[str], chance: random.Random) -> list[Kill]:
    """Does one run with some kills; it must commit the same as an undisturbed one."""
    kills, out = plan(kinds, chance), folder / "run"
    RoughRun(write_recipe(folder, recipe()), out, chance).to_the_end(kills)
    assert committed(out) == calm, "rows and weights are bitwise those of the undisturbed run"
    steps = [line["step"] for line in read_json_lines(Storage(out), "iter_000/train_log.jsonl")]
    assert steps == list(range(STEPS)), "each step is logged once"
    assert sum(kill.shards for kill in kills) <= REPLICAS * len(kills), "at most the shards in flight"
    assert sum(kill.steps for kill in kills) <= 2 * CHECKPOINT_EVERY * len(kills), "the steps since a checkpoint"
    shutil.rmtree(out)
    return kills


def run_for(seconds: float, folder: Path, calm: dict[str, str], chance: random.Random) -> list[Kill]:
    """Does rough runs of three kills each, with all kinds in turn."""
    deadline, kinds, kills = time.monotonic() + seconds, [], []
    while time.monotonic() < deadline:
        if len(kinds) < 3:
            kinds += chance.sample(KINDS, len(KINDS))
        kills += run_roughly(folder, calm, kinds[:3], chance)
        del kinds[:3]
    return kills
