"""What vLLM's other processes wrote, as vLLM 0.29 writes it, in place of an error that points there."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spin_ray.runtime.root_cause import cause_in, end_of

NO_ROOM = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."
OF_THE_CORE = f"""\
(EngineCore pid=7) WARNING 11-29 11:03:58 [vllm.py:663] Model Runner V2 requires Triton
(EngineCore pid=7) ERROR 11-29 11:04:00 [core.py:1374] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-29 11:04:00 [core.py:1374] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-29 11:04:00 [core.py:1374]     raise ValueError(
(EngineCore pid=7) ERROR 11-29 11:04:00 [core.py:1374] {NO_ROOM}
"""
OF_A_WORKER = """\
(EngineCore pid=7) (Worker_TP1 pid=9) ERROR 11-29 11:04:00 [x.py:944] KeyError: 'inner'
(EngineCore pid=7) (Worker_TP1 pid=9) ERROR 11-29 11:04:00 [x.py:944] torch.OutOfMemoryError: CUDA out of memory.
(EngineCore pid=7) (Worker_TP0 pid=8) ERROR 11-29 11:04:01 [x.py:944] RuntimeError: Connection closed by peer
(EngineCore pid=7) ERROR 11-29 11:04:02 [core.py:1374] Exception: WorkerProc failed. See stack trace for root cause.
"""
OF_THE_MAIN_PROCESS = f"ModuleNotFoundError: No module named 'optional'\n{OF_THE_CORE}"
WITHOUT_TEXT = "(EngineCore pid=7) ERROR 11-29 11:04:00 [core.py:1374] AssertionError\n"
CRASHED = "(EngineCore pid=7) Fatal Python error: Segmentation fault\n"
START = """
import os, sys
from spin_ray.runtime.root_cause import root_cause_told
print("ValueError: of an earlier engine", flush=True)
try:
    with root_cause_told():
        os.write({number}, {written!r}.encode())
        raise RuntimeError({raised!r})
except RuntimeError as error:
    open(sys.argv[1], "w").write(str(error))
"""
FAILED = "Engine core initialization failed. See root cause above. Failed core proc(s): "


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        (OF_THE_CORE, NO_ROOM),
        (OF_A_WORKER, "torch.OutOfMemoryError: CUDA out of memory."),
        (OF_THE_MAIN_PROCESS, NO_ROOM),
        (WITHOUT_TEXT, "AssertionError"),
        (OF_THE_CORE + WITHOUT_TEXT, NO_ROOM),
        ("asyncio.exceptions.CancelledError\nAssertionError\n", ""),
        ("  what():  CUDA error: illegal\n" + OF_THE_CORE, "what():  CUDA error: illegal"),
        (CRASHED.partition(") ")[2] + OF_THE_CORE, "Fatal Python error: Segmentation fault"),
        (CRASHED, "Fatal Python error: Segmentation fault"),
        ("(EngineCore pid=7) INFO 11-29 11:04:00 [x.py:1] Error: none\nall is well\n", ""),
    ],
)
def test_the_cause_is_the_last_error_of_the_process_that_failed_first(output: str, cause: str) -> None:
    assert cause_in(output) == cause


@pytest.mark.parametrize(
    ("number", "written", "raised", "told"),
    [
        (1, OF_THE_CORE, FAILED + "{}", f"vLLM: {NO_ROOM}"),
        (2, OF_THE_CORE, FAILED + "{}", f"vLLM: {NO_ROOM}"),
        (1, "", FAILED + "{'EngineCore': -9}", "vLLM: EngineCore was ended by signal 9 (SIGKILL)"),
        (1, "", FAILED + "{'EngineCore': 1}", FAILED + "{'EngineCore': 1}"),
        (1, OF_THE_CORE, "another error", "another error"),
    ],
)
def test_an_error_that_points_to_the_output_is_told_by_what_is_there(
    tmp_path: Path, number: int, written: str, raised: str, told: str
) -> None:
    """In a process whose output is a file, as that of Ray's workers."""
    code = START.format(number=number, written=written, raised=raised)
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        subprocess.run([sys.executable, "-c", code, tmp_path / "told"], stdout=out, stderr=err, check=True)
    assert (tmp_path / "told").read_text() == told


def test_of_what_was_written_only_the_last_is_searched(tmp_path: Path) -> None:
    code = """
import sys
from spin_ray.runtime.root_cause import cause_since, output_sizes
print("(EngineCore pid=7) ValueError: of a request that was refused", flush=True)
begun = output_sizes()
before = cause_since(begun)
print("(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory.", flush=True)
open(sys.argv[1], "w").write(f"{before}|{cause_since(begun)}")
"""
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", code, tmp_path / "told"], stdout=out, check=True)
    assert (tmp_path / "told").read_text() == "|torch.OutOfMemoryError: CUDA out of memory."


def test_a_process_that_a_signal_ended_is_named() -> None:
    core = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), name="EngineCore")
    core.start()
    assert end_of([core]) == ""
    core.kill()
    core.join()
    assert end_of([core]) == "EngineCore was ended by signal 9 (SIGKILL)"


def test_an_output_that_is_no_file_leaves_vllms_error_as_it_is(tmp_path: Path) -> None:
    code = START.format(number=1, written=OF_THE_CORE, raised=FAILED + "{}")
    subprocess.run([sys.executable, "-c", code, tmp_path / "told"], check=True, capture_output=True)
    assert (tmp_path / "told").read_text() == FAILED + "{}"
