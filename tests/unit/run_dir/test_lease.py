"""One driver per run. The other driver is a real second process wherever that matters."""

import json
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from spin_ray.errors import RunDirError, StageError
from spin_ray.run_dir import fence
from spin_ray.run_dir import lease as lease_module
from spin_ray.run_dir.artefact import Artefact
from spin_ray.run_dir.fence import LEASE, locked
from spin_ray.run_dir.lease import Lease
from spin_ray.run_dir.storage import Storage
from tests.support.faulty_disk import FaultyDisk


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path / "run")


@contextmanager
def another_process(work: Callable[[], None]) -> Iterator[int]:
    """A fork that calls ``work``, says so, and sleeps; killed at the end if it is still there."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(done, b"1")
            time.sleep(60)
        finally:
            os._exit(1)
    try:
        assert select.select([ready], [], [], 30)[0], "the other process did not start"
        assert os.read(ready, 1) == b"1"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(done)


def holder_of(storage: Storage) -> dict:
    return json.loads(storage.read(LEASE))


def write_lease(storage: Storage, **values: object) -> None:
    """A lease as another machine would have written it."""
    foreign = {"token": "t", "host": "node-7", "boot": "other", "pid": 1, "started": 5.0, "renewed": time.time()}
    with locked(storage.root, alone=True):  # not in the midst of a renewal
        storage.replace(LEASE, json.dumps(foreign | values).encode())


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s in vain"
        time.sleep(0.01)


def test_a_lease_is_there_while_it_is_held_and_gone_afterwards(storage):
    with Lease(storage, timeout_s=60) as lease:
        assert holder_of(storage)["pid"] == os.getpid()
        lease.storage.replace("LATEST", b"sft")
    assert not storage.exists(LEASE)


def test_a_lease_is_released_when_the_run_fails(storage):
    with pytest.raises(ZeroDivisionError), Lease(storage, timeout_s=60):
        raise ZeroDivisionError
    assert not storage.exists(LEASE)


def test_a_second_driver_is_refused_and_told_who_the_first_is(storage):
    with another_process(lambda: Lease(storage, timeout_s=60).__enter__() and None) as pid:
        with pytest.raises(RunDirError, match=f"run: in use by process {pid} on .*choose another --out"):
            Lease(storage, timeout_s=60).__enter__()
        assert holder_of(storage)["pid"] == pid


def test_the_lease_of_a_killed_process_is_taken_over_at_once_though_its_time_out_is_far(storage):
    """Killed with SIGKILL; its parent has not waited for it yet, so it is still in the process table."""
    with another_process(lambda: Lease(storage, timeout_s=3600).__enter__() and None) as pid:
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        with Lease(storage, timeout_s=3600):
            assert holder_of(storage)["pid"] == os.getpid()


def test_the_lease_of_a_process_whose_number_another_one_has_now_is_taken_over(storage):
    with Lease(storage, timeout_s=3600):
        content = holder_of(storage)
    storage.replace(LEASE, json.dumps(content | {"started": content["started"] - 1}).encode())
    with Lease(storage, timeout_s=3600):
        pass


def test_setting_the_clock_does_not_make_a_living_driver_look_dead(storage, monkeypatch):
    """psutil adds the boot time, which follows the clock, to the ticks since boot."""
    from psutil import _pslinux

    with another_process(lambda: Lease(storage, timeout_s=60).__enter__() and None):
        monkeypatch.setattr(_pslinux, "boot_time", lambda: 12345.0)
        with pytest.raises(RunDirError, match="in use by process"):
            Lease(storage, timeout_s=60).__enter__()


def test_a_lease_of_another_machine_counts_until_its_time_out(storage):
    write_lease(storage, renewed=time.time() - 61)
    with Lease(storage, timeout_s=60):
        assert holder_of(storage)["pid"] == os.getpid()


@pytest.mark.slow
@pytest.mark.parametrize("ahead_s", [0, 3600], ids=["its clock is right", "its clock is fast"])
def test_a_fresh_lease_of_another_machine_is_waited_for_until_it_is_stale(storage, caplog, ahead_s):
    """The next attempt of a RayJob was refused by the lease of its lost head."""
    write_lease(storage, renewed=time.time() + ahead_s)
    began = time.monotonic()
    with Lease(storage, timeout_s=1):
        assert holder_of(storage)["pid"] == os.getpid()
    assert 0.5 < time.monotonic() - began < 10
    assert "in use by process 1 on node-7" in caplog.text and "waiting up to 1 s to see if it lives" in caplog.text


@pytest.mark.slow
def test_a_driver_of_another_machine_that_renews_its_lease_is_left_alone(storage):
    write_lease(storage, renewed=time.time() - 2)
    renewal = threading.Timer(0.3, lambda: write_lease(storage, renewed=time.time()))
    renewal.start()
    with pytest.raises(RunDirError, match=r"in use by process 1 on node-7 \(lease renewed \d s ago\); wait for it"):
        Lease(storage, timeout_s=60).__enter__()
    renewal.join()
    assert holder_of(storage)["host"] == "node-7"


def test_a_renewal_at_the_last_look_is_seen(storage, monkeypatch):
    write_lease(storage, renewed=time.time())
    looks = []

    def nap(_: float) -> None:
        looks.append(True)
        if len(looks) > 5:  # the time is over
            write_lease(storage, renewed=time.time())
            clock[0] += 3600

    clock = [0.0]
    monkeypatch.setattr(lease_module.time, "sleep", nap)
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: clock[0])
    with pytest.raises(RunDirError, match="in use by process 1 on node-7"):
        Lease(storage, timeout_s=60).__enter__()


def test_a_lease_is_renewed_four_times_per_time_out(storage):
    with Lease(storage, timeout_s=0.2):
        first = holder_of(storage)["renewed"]
        wait_for(lambda: holder_of(storage)["renewed"] > first)


CHANGES: dict[str, Callable[[Storage], object]] = {
    "create": lambda storage: storage.create("iter_000/pairs/_MANIFEST.json", b"mine"),
    "create_folder": lambda storage: storage.create_folder("iter_000/model", storage.path("attempt")),
    "replace": lambda storage: storage.replace("LATEST", b"mine"),
    "append": lambda storage: storage.append("events.jsonl", "mine\n"),
    "delete": lambda storage: storage.delete("iter_000"),
}


def test_a_driver_whose_lease_was_taken_over_can_change_nothing(storage):
    """Paused for longer than the time-out, it wakes and goes on where it was; so do the actors it started."""
    storage.create("iter_000/pairs/part-00000.parquet", b"of the new driver")
    storage.create("attempt/file", b"")
    with Lease(storage, timeout_s=60) as lease:
        lease.storage.append("events.jsonl", "still allowed\n")
        in_an_actor = pickle.loads(pickle.dumps(lease.storage))  # noqa: S301 (our own)
        write_lease(storage)
        before = {path: path.read_bytes() for path in storage.root.rglob("*") if path.is_file()}
        for change in CHANGES.values():
            for woken in (lease.storage, in_an_actor):
                with pytest.raises(RunDirError, match="taken over by process 1 on node-7; this driver stops"):
                    change(woken)
    assert {path: path.read_bytes() for path in storage.root.rglob("*") if path.is_file()} == before
    assert holder_of(storage)["host"] == "node-7"


def test_a_driver_whose_lease_was_removed_stops(storage):
    storage.create("run.json", b"{}")
    with Lease(storage, timeout_s=60) as lease:
        storage.delete(LEASE)
        with pytest.raises(RunDirError, match="nobody"):
            lease.storage.replace("LATEST", b"sft")
    assert not storage.exists("LATEST")


def test_a_takeover_waits_for_a_change_that_has_begun(storage):
    """The look at the lease and the change are one moment: no driver gets the lease between them."""
    with Lease(storage, timeout_s=60) as lease:
        took = threading.Event()

        def take_over() -> None:
            with locked(storage.root, alone=True):
                took.set()

        with lease.storage._held():
            thread = threading.Thread(target=take_over)
            thread.start()
            assert not took.wait(0.2)
        assert took.wait(10)
        thread.join()


def test_a_paused_driver_that_wakes_after_a_takeover_changes_nothing_more(storage, monkeypatch):
    """A real process, stopped by SIGSTOP while it writes as fast as it can; this one takes over as another machine."""
    pid = os.fork()
    if pid == 0:
        try:
            paused = Lease(storage, timeout_s=3600).__enter__()
            for number in range(10**9):
                paused.storage.replace("LATEST", str(number).encode())
        except RunDirError:
            os._exit(7)
        finally:
            os._exit(1)
    try:
        wait_for(lambda: storage.exists("LATEST"))
        monkeypatch.setattr(lease_module, "_boot_id", lambda: "another machine")
        lease = None
        while lease is None:  # until it is not stopped within a change, for whose end a takeover waits
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.1)
            try:
                with monkeypatch.context() as patch:
                    patch.setattr(fence, "LOCK_TIMEOUT_S", 0.05)
                    lease = Lease(storage, timeout_s=0.1).__enter__()
            except RunDirError:
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.01)
        lease.storage.replace("LATEST", b"of the new driver")
        os.kill(pid, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert storage.read("LATEST") == b"of the new driver"
        lease.__exit__(None, None, None)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise


def test_a_takeover_that_waits_for_a_paused_change_says_so(storage, monkeypatch):
    monkeypatch.setattr(fence, "LOCK_TIMEOUT_S", 0.05)
    with (
        locked(storage.root, alone=False),
        pytest.raises(RunDirError, match=r"waited 0.05 s for a change of another process to end; .* may be paused"),
    ):
        Lease(storage, timeout_s=60).__enter__()


def test_a_renewal_of_a_lost_lease_does_not_take_it_back(storage):
    with Lease(storage, timeout_s=0.1) as lease:
        write_lease(storage)
        wait_for(lambda: not lease._renewer.is_alive())
        assert holder_of(storage)["host"] == "node-7"


def test_what_an_earlier_driver_of_this_process_left_behind_is_not_held(storage):
    """A notebook whose run failed while its lease could not be removed."""
    with Lease(storage, timeout_s=3600):
        content = storage.read(LEASE)
    storage.replace(LEASE, content)
    with Lease(storage, timeout_s=3600):
        pass


def test_a_second_driver_of_the_same_process_is_refused(storage):
    with (
        Lease(storage, timeout_s=3600),
        pytest.raises(RunDirError, match=f"in use by process {os.getpid()}"),
        Lease(storage, timeout_s=3600),
    ):
        pass


def test_a_damaged_lease_is_named(storage):
    storage.replace(LEASE, b'{"tok')
    with pytest.raises(RunDirError, match=r"lease\.json: is damaged; remove it if no other driver"):
        Lease(storage, timeout_s=60).__enter__()


@pytest.mark.parametrize(
    ("step", "error"),
    [("replace", StageError("lease.json: could not be written (Input/output error)")), ("find", OSError(116, "Stale"))],
)
def test_a_renewal_that_fails_once_is_made_up_for(storage, monkeypatch, caplog, step, error):
    done, failed = getattr(Storage, step), []

    def fail_once(*arguments):
        if not failed and threading.current_thread().name == "lease":
            failed.append(True)
            raise error
        return done(*arguments)

    with Lease(storage, timeout_s=0.1) as lease:
        first = holder_of(storage)["renewed"]
        monkeypatch.setattr(Storage, step, fail_once)
        wait_for(lambda: failed and holder_of(storage)["renewed"] > first)
        lease.storage.replace("LATEST", b"sft")
    assert "could not be renewed" in caplog.text


@pytest.mark.parametrize("renewals_follow", [True, False])
def test_a_renewal_that_was_written_and_then_failed_loses_no_lease(tmp_path, renewals_follow):
    """The rename is done, and then the file server says EIO."""
    with Lease(Storage(tmp_path / "calm", calm := FaultyDisk()), timeout_s=60):
        rename = len(calm.points) + 2
    disk = FaultyDisk(at=rename, fault="EIO after the effect")
    storage = Storage(tmp_path / "run", disk)
    with Lease(storage, timeout_s=0.1):
        wait_for(lambda: len(disk.points) > rename)
        assert disk.points[rename] == f"replace {storage.path(LEASE)}"
        written = holder_of(storage)["renewed"]
        if renewals_follow:
            wait_for(lambda: holder_of(storage)["renewed"] > written)
    assert not storage.exists(LEASE)


def test_of_drivers_that_start_together_one_gets_the_lease(storage):
    """Four processes, one gate: each says 1 if it holds the lease, 0 if it was refused."""
    gate_read, gate_write = os.pipe()
    say_read, say_write = os.pipe()
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                os.read(gate_read, 1)
                Lease(storage, timeout_s=60).__enter__()
                os.write(say_write, b"1")
                time.sleep(60)
            except RunDirError:
                os.write(say_write, b"0")
            finally:
                os._exit(0)
        children.append(pid)
    try:
        os.write(gate_write, b"gogo")
        said = b""
        while len(said) < 4:
            assert select.select([say_read], [], [], 30)[0]
            said += os.read(say_read, 4)
        assert sorted(said) == sorted(b"0001")
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_path_that_cannot_hold_a_run_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunDirError, match=r"cannot hold a run \(.*\); choose another --out"):
            Lease(Storage(path), timeout_s=60).__enter__()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_machine_is_named_by_its_boot_and_its_process_numbers():
    """Two containers of one machine do not see each other's processes: they are two machines here."""
    assert os.readlink("/proc/self/ns/pid") in lease_module._boot_id()


def test_a_second_thread_does_not_take_over_a_lease_in_the_moment_it_was_written(storage, tmp_path):
    """The other thread looks between the write and the first one's next line."""
    refused = []

    class Watched(Storage):
        def swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
            swapped = super().swap(name, old, new)
            if swapped and new is not None:
                with pytest.raises(RunDirError, match="in use by process"):
                    Lease(storage, timeout_s=60).__enter__()
                refused.append(new)
            return swapped

    with Lease(Watched(tmp_path / "run"), timeout_s=60):
        assert len(refused) == 1


def test_a_driver_whose_folder_was_moved_away_says_so_and_makes_none_in_its_place(storage):
    """Another start there would begin from zero."""
    storage.create("attempt/file", b"")
    with Lease(storage, timeout_s=60) as lease:
        storage.create("run.json", b"{}")
        storage.root.rename(storage.root.with_name("moved"))
        calls = [
            *CHANGES.values(),
            lambda it: it.update("eval.json", lambda _: b"new"),
            lambda it: it.new_attempt_folder(),
        ]
        for call in [*calls, lambda it: Artefact(it, "prompts").manifest()]:
            with pytest.raises(
                RunDirError, match=r"run: the folder is gone while the run wrote to it .*place to --out"
            ):
                call(lease.storage)
    assert not storage.root.exists()
