"""A terminal that is closed (SIGHUP) ends a command as SIGTERM does, unless nohup started it."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import ray

from spin_ray.runtime.connect import connect
from tests.support.fakes import config_of
from tests.support.paths import ROOT

PROGRAM = """
import signal, sys, time
from spin_ray import __main__ as program

def work(**_):
    try:
        print("begun", flush=True)
        for _ in range(6000):
            time.sleep(0.01)
            if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
                print("goes on", flush=True)
                break
    finally:
        print("lease released", flush=True)

program.cli = work
sys.argv = ["spin-ray", "run"]
program.main()
"""


def hung_up(*before: str) -> tuple[int, str, str]:
    """Runs a command, sends SIGHUP when it has begun; returns its exit code, stdout and stderr."""
    heeds = "" if before else "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # also below nohup pytest
    process = subprocess.Popen(
        [*before, sys.executable, "-c", f"{heeds}\n{PROGRAM}"], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGHUP)
    out, error = process.communicate(timeout=100)
    return process.returncode, out, error


def test_a_closed_terminal_ends_a_command_in_peace() -> None:
    code, out, error = hung_up()
    assert (code, out) == (1, "lease released\n") and "stopped; the same command goes on" in error


def test_what_nohup_started_goes_on() -> None:
    code, out, _ = hung_up("nohup")
    assert (code, out) == (0, "goes on\nlease released\n")


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("is_ignored", [False, True])
def test_the_signals_are_taken_again_once_ray_has_taken_them(monkeypatch, handlers, is_ignored) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect(config_of())
    taken = signal.getsignal(signal.SIGHUP)
    if is_ignored:
        assert taken is signal.SIG_IGN
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        handler = signal.getsignal(number)
        assert callable(handler)
        with pytest.raises(SystemExit) as stopped:
            handler(number, None)
        assert stopped.value.code == signal.SIGTERM
