"""GPU memory is waited for, told from what NVML would say; no card is here."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private.thirdparty import pynvml

from spin_ray.errors import StageError
from spin_ray.runtime import gpu_memory
from spin_ray.runtime.gpu_memory import Card, visible_cards, wait_for_memory

GIB = 2**30
FULL = Card(name="GPU 0 (H100)", kind="H100", total=80 * GIB, free=10 * GIB, processes=("process 4711 (69.0 GiB)",))
EMPTY = Card(name="GPU 0 (H100)", kind="H100", total=80 * GIB, free=79 * GIB)


def test_waiting_ends_when_the_last_process_let_go(monkeypatch):
    looks = iter([[FULL], [FULL], [EMPTY]])
    monkeypatch.setattr(time, "sleep", lambda _: None)
    wait_for_memory(0.9, "share", look=lambda count: next(looks))
    assert next(looks, None) is None


def test_what_is_never_let_go_is_an_error_with_card_bytes_process_and_remedy():
    with pytest.raises(StageError) as caught:
        wait_for_memory(0.9, "share", wait_s=0, look=lambda count: [FULL, EMPTY])
    assert str(caught.value) == (
        "after 0 s, GPU 0 (H100): 10.0 GiB of 80.0 GiB are free, held by process 4711 (69.0 GiB), but share 0.9 "
        "asks for 72.0 GiB; end the other process or lower share"
    )


@pytest.fixture
def nvml(monkeypatch) -> dict[str, Any]:
    """NVML with two cards."""
    told: dict[str, Any] = {"asked": [], "processes": [SimpleNamespace(pid=4711, usedGpuMemory=69 * GIB)]}

    def handle(name: Any) -> Any:
        told["asked"].append(name)
        return name

    def processes(_: Any) -> Any:
        if isinstance(told["processes"], Exception):
            raise told["processes"]
        return told["processes"]

    for name, does in {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": handle, "nvmlDeviceGetHandleByUUID": handle,
        "nvmlDeviceGetName": lambda _: b"H100", "nvmlDeviceGetComputeRunningProcesses": processes,
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=80 * GIB, free=10 * GIB),
    }.items():  # fmt: skip
        monkeypatch.setattr(pynvml, name, does)
    return told


@pytest.mark.parametrize(
    ("visible", "count", "asked"),
    [
        (None, None, [0, 1]), (None, 1, [0]), ("1", None, [1]), ("GPU-ab12", None, ["GPU-ab12"]), ("", None, []),
        ("1,0", 1, [1]), ("0,-1,1", None, [0]),
    ],
)  # fmt: skip
def test_the_cards_are_those_that_this_process_may_use(nvml, monkeypatch, visible, count, asked):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cards = visible_cards(count)
    assert nvml["asked"] == asked
    assert [card.processes for card in cards] == [("process 4711 (69.0 GiB)",)] * len(asked)


def test_a_card_tells_its_memory_also_where_it_may_not_name_processes(nvml, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    nvml["processes"] = pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
    assert visible_cards() == [Card(name="GPU 0 (H100)", kind="H100", total=80 * GIB, free=10 * GIB)]


def test_without_a_driver_nothing_is_waited_for():
    assert gpu_memory.visible_cards() == []
