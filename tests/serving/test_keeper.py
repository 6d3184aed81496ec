"""The keeper's bookkeeping: what it starts, announces and retires, when engines start slowly or not at all.

How an engine is really started, probed and drained is seen with a real server (``test_real_server.py``); here starting
one is a wait for a signal.
"""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
from ray.serve.schema import ApplicationStatus, ReplicaState

from spin_ray.config.sections import ServingConfig
from spin_ray.run_dir.run_dir import RunDir
from spin_ray.serving import keeper as keeper_module
from spin_ray.serving.iterates import Iterate, open_iterate
from spin_ray.serving.keeper import EngineFailed, Keeper, _reason, settings_mark
from tests.support.tiny_runs import add_adapter, add_iterate, make_adapter_run, make_run


class SlowKeeper(Keeper):
    """A keeper whose engines start when ``gates`` lets them, and fail if they are in ``broken``."""

    async def __init__(self, run: RunDir, applications: dict[str, Any] | None = None, *, holds: bool = False) -> None:
        self.applications = applications or {}
        self.gates: dict[str, asyncio.Event] = {}
        self.broken: set[str] = set()
        self.drained: list[str] = []
        self.dead: set[str] = set()
        self.causes: dict[str, str] = {}
        self.probed: set[str] = set()
        self.looks = 0
        await super().__init__(str(run.storage.root), run.config(), holds=holds)

    async def _ask_applications(self) -> dict[str, Any]:
        return self.applications

    async def _start(self, app: str, iterate: Iterate) -> None:
        await self.gates.setdefault(iterate.name, asyncio.Event()).wait()
        if iterate.name in self.broken:
            raise EngineFailed("it does not load")

    async def _drain(self, app: str) -> None:
        self.drained.append(app.split(".")[1])
        await asyncio.sleep(60)  # a grace time that no test sees the end of

    async def _ask_serve(self, _: Any, app: str, **__: Any) -> None:
        """Notes what would be deleted without the grace time."""
        self.drained.append(app.split(".")[1])

    async def _cause_of_death(self, app: str) -> str:
        return self.causes.get(app.split(".")[1], "")

    async def _forget_cause(self, app: str) -> None:
        self.causes.pop(app.split(".")[1], None)

    async def _running(self) -> set[str]:
        self._applications = self.applications
        self.looks += 1
        return self.probed | {engine["app"] for name, engine in self._engines.items() if name not in self.dead}

    def let(self, name: str) -> None:
        self.gates.setdefault(name, asyncio.Event()).set()

    async def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Returns the first table for which ``holds``."""
        version = -1
        while True:
            table = await self.table(version, 0.2)
            if holds(table):
                return table
            version = table["version"]


class Beholder(Keeper):
    """A keeper that looks at replicas and does nothing else; ``states`` is what Ray Serve tells."""

    def __init__(self) -> None:
        self._prefix, self._engines = "engine.", {}
        self._loops, self._starting, self._draining = (), {}, {}
        self._calm_replicas, self._seen_running = set(), set()
        self.states: dict[str, ReplicaState] = {}

    async def _ask_applications(self) -> dict[str, Any]:
        deployment = {app: SimpleNamespace(replica_states={state: 1}) for app, state in self.states.items()}
        return {app: SimpleNamespace(deployments={"engine": each}) for app, each in deployment.items()}


def follow(
    run: RunDir, check: Callable[[SlowKeeper], Awaitable[None]], applications: dict[str, Any] | None = None
) -> None:
    async def main() -> None:
        keeper = SlowKeeper.__new__(SlowKeeper)
        await keeper.__init__(run, applications)  # type: ignore[misc]  # Ray Serve awaits it, too
        await asyncio.wait_for(check(keeper), 60)
        keeper.check_health()

    asyncio.run(main())


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run", iterates=1)


def test_a_slow_engine_keeps_no_other_waiting_and_two_that_end_together_are_both_kept(run: RunDir) -> None:
    async def check(keeper: SlowKeeper) -> None:
        keeper.let("iter-0")
        table = await keeper.until(lambda table: table["newest"] == "iter-0")
        assert list(table["engines"]) == ["iter-0"]
        assert table["starting"] == {"sft": "its files are checked"} and not table["settled"]
        keeper.let("sft")
        table = await keeper.until(lambda table: table["settled"])
        assert len(table["engines"]) == 2 and table["newest"] == "iter-0" and not table["problems"]

    follow(run, check)


def test_latest_moves_only_once_the_new_engine_serves_and_then_the_old_one_goes(run: RunDir) -> None:
    async def check(keeper: SlowKeeper) -> None:
        keeper.let("sft")
        keeper.let("iter-0")
        await keeper.until(lambda table: len(table["engines"]) == 2 and table["newest"] == "iter-0")
        add_iterate(run, 2)
        run.publish(2)
        while "iter-1" not in keeper.gates:
            await asyncio.sleep(0.05)
        table = await keeper.table(-1, 1)
        assert table["newest"] == "iter-0" and set(table["engines"]) == {"sft", "iter-0"}
        keeper.let("iter-1")
        await keeper.until(lambda table: table["newest"] == "iter-1" and set(table["engines"]) == {"sft", "iter-1"})
        await asyncio.sleep(0.1)
        assert keeper.drained == ["iter-0"]

    follow(run, check)


def test_an_engine_that_fails_leaves_the_old_one_says_why_and_is_tried_again(run: RunDir) -> None:
    async def check(keeper: SlowKeeper) -> None:
        for name in ("sft", "iter-0", "iter-1"):
            keeper.let(name)
        keeper.broken = {"iter-1"}
        await keeper.until(lambda table: table["newest"] == "iter-0")
        add_iterate(run, 2)
        run.publish(2)
        table = await keeper.until(lambda table: "iter-1" in table["problems"])
        assert table["problems"]["iter-1"] == "it does not load"
        assert table["newest"] == "iter-0" and "iter-0" in table["engines"]
        keeper.broken = set()
        table = await keeper.until(lambda table: table["newest"] == "iter-1")
        assert not table["problems"]

    follow(run, check)


def test_an_engine_of_other_settings_answers_until_its_successor_does(run: RunDir) -> None:
    """A changed ``serveConfigV2`` starts another keeper in the same cluster."""
    earlier = {name: f"engine.{name}.{open_iterate(run, name).digest[:16]}.00000000" for name in ("sft", "iter-0")}

    async def check(keeper: SlowKeeper) -> None:
        keeper.broken = {"iter-0"}
        table = await keeper.until(lambda table: len(table["engines"]) == 2)
        assert {name: engine["app"] for name, engine in table["engines"].items()} == earlier
        assert set(table["starting"]) == {"sft", "iter-0"}
        for name in earlier:
            keeper.let(name)
        table = await keeper.until(lambda table: not table["starting"])
        assert table["engines"]["sft"]["app"] == f"{earlier['sft'][:-8]}{settings_mark(run.config())}"
        assert table["engines"]["iter-0"]["app"] == earlier["iter-0"] and table["problems"]["iter-0"]
        await asyncio.sleep(0.5)  # two looks later
        assert keeper.drained == ["sft"], "once, after the grace time"
        keeper.broken = set()
        table = await keeper.until(lambda table: not table["problems"])
        assert not table["engines"]["iter-0"]["app"].endswith(".00000000")

    running = SimpleNamespace(status=ApplicationStatus.RUNNING)
    follow(run, check, dict.fromkeys(earlier.values(), running))


def test_unused_engines_of_an_earlier_keeper_go_once_nothing_starts(run: RunDir) -> None:
    async def check(keeper: SlowKeeper) -> None:
        keeper.let("sft")
        await keeper.until(lambda table: list(table["starting"]) == ["iter-0"])
        await asyncio.sleep(0.3)
        assert not keeper.drained
        keeper.let("iter-0")
        await keeper.until(lambda table: table["settled"])
        while not keeper.drained:
            await asyncio.sleep(0.05)
        assert keeper.drained == ["iter-7"]

    follow(run, check, {"engine.iter-7.0123456789abcdef.00000000": None, "another's": None})


@pytest.mark.parametrize(
    ("changed", "replaced"),
    [
        ({"replicas": 2, "max_replicas": 2}, True),
        ({"request_timeout_s": 33}, True),
        ({"engine": {"gpu_memory_utilization": 0.5}}, True),
        ({"keys": "/other/keys"}, False),
        ({"max_tokens": 7}, False),
        ({"models": ["sft"]}, False),
    ],
)
def test_an_engine_is_replaced_for_settings_that_it_reads(run: RunDir, changed: dict[str, Any], replaced: bool) -> None:
    config = run.config()
    other = config.model_copy(update={"serving": ServingConfig.model_validate(config.serving.model_dump() | changed)})
    assert (settings_mark(other) != settings_mark(config)) is replaced


def test_in_a_rayservice_the_keeper_is_ready_once_each_first_engine_serves_or_has_failed(run: RunDir) -> None:
    """KubeRay sends clients to a new cluster when its applications run."""

    async def main() -> None:
        keeper = SlowKeeper.__new__(SlowKeeper)
        ready = asyncio.create_task(keeper.__init__(run, holds=True))  # type: ignore[misc]
        while not {"sft", "iter-0"} <= set(getattr(keeper, "gates", ())):
            await asyncio.sleep(0.05)
        keeper.broken = {"iter-0"}
        keeper.let("sft")
        await keeper.until(lambda table: "sft" in table["engines"])
        await asyncio.sleep(0.1)
        assert not ready.done()
        keeper.let("iter-0")
        await asyncio.wait_for(ready, 10)
        assert "iter-0" in (await keeper.table(-1, 0))["problems"]

    asyncio.run(main())


def test_a_keeper_that_finds_engines_of_other_settings_is_ready_at_once(run: RunDir) -> None:
    """While it starts, Ray Serve's new ingress waits for it."""
    running = SimpleNamespace(status=ApplicationStatus.RUNNING)
    earlier = [f"engine.{name}.{open_iterate(run, name).digest[:16]}.00000000" for name in ("sft", "iter-0")]

    async def main() -> None:
        keeper = SlowKeeper.__new__(SlowKeeper)
        ready = keeper.__init__(run, dict.fromkeys(earlier, running), holds=True)  # type: ignore[misc]
        await asyncio.wait_for(ready, 30)
        assert len((await keeper.table(-1, 0))["engines"]) == 2 and keeper.gates and not keeper.drained

    asyncio.run(main())


def test_an_iterate_that_was_made_again_replaces_its_engine_once_the_new_one_serves(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "_COMPARE_S", 0)

    async def check(keeper: SlowKeeper) -> None:
        for name in ("sft", "iter-0"):
            keeper.let(name)
        engines = (await keeper.until(lambda table: table["settled"]))["engines"]
        keeper.gates["iter-0"].clear()
        run.storage.delete("iter_000/model")
        await asyncio.sleep(1)
        assert (await keeper.table(-1, 1))["settled"], "it is not there, and its engine goes on"
        add_iterate(run, 1, seed=7)
        await keeper.until(lambda table: "iter-0" in table["starting"])
        await asyncio.sleep(0.5)
        assert (await keeper.table(-1, 1))["engines"] == engines and not keeper.drained
        keeper.let("iter-0")
        table = await keeper.until(lambda table: table["settled"])
        assert table["engines"]["sft"] == engines["sft"]
        assert table["engines"]["iter-0"]["digest"] == open_iterate(run, "iter-0").digest != engines["iter-0"]["digest"]
        assert table["engines"]["iter-0"]["app"] != engines["iter-0"]["app"]
        await asyncio.sleep(0.1)
        assert keeper.drained == ["iter-0"]

    follow(run, check)


def test_one_that_was_made_again_and_does_not_start_leaves_the_old_engine_and_says_why(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "_COMPARE_S", 0)

    async def check(keeper: SlowKeeper) -> None:
        for name in ("sft", "iter-0"):
            keeper.let(name)
        engines = (await keeper.until(lambda table: table["settled"]))["engines"]
        keeper.broken = {"iter-0"}
        run.storage.delete("iter_000/model")
        add_iterate(run, 1, seed=7)
        table = await keeper.until(lambda table: bool(table["problems"]))
        assert table["problems"] == {"iter-0": "it does not load"}
        assert table["engines"] == engines and not keeper.drained

    follow(run, check)


def test_an_adapter_that_was_made_again_needs_the_server_to_start_again_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "_COMPARE_S", 0)
    run = make_adapter_run(tmp_path / "run", iterates=1)

    async def check(keeper: SlowKeeper) -> None:
        for name in ("sft", "iter-0"):
            keeper.let(name)
        engines = (await keeper.until(lambda table: table["settled"]))["engines"]
        run.storage.delete("iter_000/adapter")
        add_adapter(run, 1, seed=7)
        table = await keeper.until(lambda table: bool(table["problems"]))
        assert table["problems"]["iter-0"].startswith("it was made again; start the server again")
        assert table["engines"] == engines and not keeper.drained

    follow(run, check)


def test_an_engine_that_died_is_told_within_two_looks_and_again_once_it_is_back(run: RunDir) -> None:
    async def check(keeper: SlowKeeper) -> None:
        for name in ("sft", "iter-0"):
            keeper.let(name)
        await keeper.until(lambda table: len(table["engines"]) == 2)
        keeper.dead, before = {"iter-0"}, keeper.looks
        table = await asyncio.wait_for(keeper.until(lambda table: table["down"] == ["iter-0"]), 20)
        assert keeper.looks - before <= 2 and keeper_module._LOOK_S <= 1
        assert set(table["engines"]) == {"sft", "iter-0"}
        keeper.dead = set()
        await asyncio.wait_for(keeper.until(lambda table: not table["down"]), 20)

    follow(run, check)


def test_an_engine_that_died_is_told_with_its_cause_and_then_with_why_it_does_not_start_again(run: RunDir) -> None:
    out_of_memory = "torch.OutOfMemoryError: CUDA out of memory."

    async def check(keeper: SlowKeeper) -> None:
        async def told(text: str) -> None:
            await asyncio.wait_for(keeper.until(lambda table: table["troubles"] == {"iter-0": text}), 20)

        for name in ("sft", "iter-0"):
            keeper.let(name)
        table = await keeper.until(lambda table: len(table["engines"]) == 2)
        assert table["troubles"] == {}
        keeper.causes, keeper.dead = {"iter-0": out_of_memory}, {"iter-0"}
        await told(f"its engine has ended ({out_of_memory}) and starts again")
        deployment = SimpleNamespace(replica_states={ReplicaState.STARTING: 1}, message=f"Error:\n{out_of_memory}\n")
        keeper.applications[table["engines"]["iter-0"]["app"]] = SimpleNamespace(
            deployments={"engine": deployment}, status=ApplicationStatus.UNHEALTHY
        )
        await told(f"its engine has ended and cannot start again ({out_of_memory}); trying again")
        deployment.replica_states, keeper.dead = {ReplicaState.RUNNING: 1}, set()
        await asyncio.wait_for(keeper.until(lambda table: not table["troubles"]), 20)
        keeper.dead = {"iter-0"}
        await told("its engine has ended and starts again")

    follow(run, check)


def test_the_cause_of_a_death_while_an_engine_was_probed_is_not_that_of_a_later_one(run: RunDir) -> None:
    """The engine runs before it serves."""

    async def check(keeper: SlowKeeper) -> None:
        keeper.causes, keeper.probed = {"iter-0": "an old cause"}, {"engine.iter-0.ab"}
        async with asyncio.timeout(20):
            while keeper.causes:
                await asyncio.sleep(0.05)
        assert not (await keeper.table(-1, 0))["engines"]

    follow(run, check)


def test_a_run_that_cannot_be_read_is_told_until_it_can(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system whose server has started again."""

    async def check(keeper: SlowKeeper) -> None:
        for name in ("sft", "iter-0"):
            keeper.let(name)
        await keeper.until(lambda table: table["settled"])
        with monkeypatch.context() as patch:
            stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/r/LATEST")
            patch.setattr(keeper_module, "wanted", Mock(side_effect=stale))
            table = await asyncio.wait_for(keeper.until(lambda table: bool(table["troubles"])), 20)
        assert table["troubles"] == {"run": f"cannot be followed ({stale}); trying again"}
        assert len(table["engines"]) == 2 and not table["problems"]
        await asyncio.wait_for(keeper.until(lambda table: not table["troubles"]), 20)

    follow(run, check)


def test_a_failed_answer_is_told_for_a_while(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "_FAILURE_S", 2)

    async def check(keeper: SlowKeeper) -> None:
        await keeper.note_failure("sft", "CUDA error")
        table = await keeper.table(-1, 0)
        assert table["failures"] == {"sft": "an answer failed (CUDA error)"} and not table["troubles"]
        await asyncio.wait_for(keeper.until(lambda table: not table["failures"]), 20)

    follow(run, check)


def test_a_keeper_that_is_stopped_ends_its_work_without_a_word_and_no_engine(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    """Engines serve, one starts, one is drained. Ray Serve calls the destructor, then ends the loop's threads."""

    async def main() -> None:
        threads, before = ThreadPoolExecutor(), asyncio.all_tasks()
        asyncio.get_running_loop().set_default_executor(threads)
        keeper = SlowKeeper.__new__(SlowKeeper)
        await keeper.__init__(run, {"engine.iter-7.0123456789abcdef.00000000": None})  # type: ignore[misc]
        keeper.let("sft")
        keeper.let("iter-0")
        while not keeper.drained:
            await asyncio.sleep(0.05)
        add_iterate(run, 2)
        run.publish(2)
        await keeper.until(lambda table: "iter-1" in table["starting"])
        caplog.clear()
        keeper.__del__()
        threads.shutdown(wait=False)
        await asyncio.sleep(1)  # several looks
        assert asyncio.all_tasks() == before
        assert keeper.drained == ["iter-7"]

    asyncio.run(asyncio.wait_for(main(), 60))
    assert not caplog.records


def test_an_engine_of_an_earlier_keeper_that_starts_again_is_seen_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its new replica keeps its name from its start to the moment when it runs."""
    seen, replicas, keeper = [], list[str](), Beholder()
    monkeypatch.setattr(
        ray.util, "list_named_actors", lambda all_namespaces: [{"name": f"SERVE_REPLICA::{it}"} for it in replicas]
    )
    for names, state in (
        (["engine.a#E#1"], ReplicaState.RUNNING),
        ([], ReplicaState.RUNNING),
        (["engine.a#E#2"], ReplicaState.STARTING),
        (["engine.a#E#2"], ReplicaState.RUNNING),
    ):
        replicas[:] = names
        keeper.states = {"engine.a": state}
        keeper._seen_running = asyncio.run(keeper._running())
        seen.append(sorted(keeper._seen_running))
    assert seen == [["engine.a"], [], [], ["engine.a"]]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("RuntimeError: vLLM: ValueError: no room for a cache", "vLLM: ValueError: no room for a cache"),
        ("spin_ray.errors.RunDirError: /r/sft: changed; restore it", "/r/sft: changed; restore it"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "torch.OutOfMemoryError: CUDA out of memory."),
        ("it waits", "no reason given"),
    ],
)
def test_an_engine_that_did_not_start_is_told_by_the_last_error_that_ray_serve_has(error: str, told: str) -> None:
    """A deployment's message has it as a traceback; the application's names the deployment alone."""
    message = f"A replica failed to start with exception. Error:\nRuntimeError: Traceback (most recent …):\n{error}\n"
    assert (
        _reason(message if "Error" in error else error, "Failed to update the deployments ['IterateEngine'].") == told
    )
