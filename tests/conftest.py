"""Sets up every test process before torch or Ray is imported, and names the slowest tests of each suite."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from spin_ray import __main__ as cli
from spin_ray.runtime import cpu, garbage

# One process starts several clusters; token mode has a test of its own.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Threads that outlive a Ray of the tests would start another one, and die with it: Ray ends the process then.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
cpu.prepare(threads=1)
garbage.collect_rarely()  # until all tests are imported, and with them torch, transformers and Ray

SLOWEST = 8
"""Tests of each suite that are named."""
HEAVY = 2
"""Processes that start engines and workers at one time."""
LONGEST = (
    "tests/e2e/test_smollm2_run.py", "tests/ray/test_many_nodes.py", "tests/unit/benchmarks/test_gpu_benchmark.py",
)  # fmt: skip
"""Files of minutes. They begin first: one of several processes would be left with them at the end.

The run of SmolLM2 and the engines of serving together would leave 1.2 of 24 GiB.
"""


ENGINES = "serving with engines"
WITH_ENGINES = frozenset(
    f"tests/serving/test_{name}.py"
    for name in (
        "adapters_on_one_engine", "arena_page", "bad_requests", "compare_command", "fuzz", "lm_eval_at_endpoint",
        "real_server", "server_stops", "serving_on_a_cluster",
    )
)  # fmt: skip
"""Files whose tests ask one real server or start engines beside it: a process that is given one of them is given all.

It starts the server once, and no other process starts engines of serving meanwhile: 24 GiB hold no third pair.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def pytest_collection_finish() -> None:
    garbage.collect_as_usual()


def _is_light(work: str) -> bool:
    """Tells whether tests start neither engines nor workers, so that 24 GiB hold a third process of them."""
    return not work.startswith(("tests/e2e/", "tests/ray/", ENGINES, *LONGEST))


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Returns what gives each process whole files, and those of ``WITH_ENGINES`` together.

    Two processes take the files in order. Those beyond take light files alone, in the time in which engines start.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class WholeFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return ENGINES if file in WITH_ENGINES else file

        def _reschedule(self, node: Any) -> None:
            if self.workqueue and not self._next_for(node):
                node.shutdown()
            else:
                super()._reschedule(node)

        def _assign_work_unit(self, node: Any) -> None:
            if work := self._next_for(node):
                self.workqueue.move_to_end(work, last=False)
                super()._assign_work_unit(node)

        def _next_for(self, node: Any) -> str | None:
            works = iter(self.workqueue)
            return next(works if node in self.nodes[:HEAVY] else filter(_is_light, works), None)

    return WholeFiles(config, log)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Calls the program in this process; returns its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spin-ray", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        out, error = capsys.readouterr()
        return code, out, error

    return call


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Writes the seconds and the slowest tests of each suite, if ``--durations`` asks for any."""
    if config.getoption("durations") is None:
        return
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                suite = "/".join(report.nodeid.split("/")[:2])
                seconds[suite][report.nodeid] += report.duration
    for suite, tests in sorted(seconds.items()):
        terminalreporter.section(f"{suite}: {len(tests)} tests, {sum(tests.values()):.0f} s")
        for name in sorted(tests, key=tests.__getitem__, reverse=True)[:SLOWEST]:
            terminalreporter.write_line(f"{tests[name]:7.1f} s  {name}")
