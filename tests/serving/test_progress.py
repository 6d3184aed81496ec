"""What the user is told while engines start."""

from types import SimpleNamespace
from typing import Any

from spin_ray.config.sections import ServingConfig
from spin_ray.serving.engines import ENDED
from spin_ray.serving.front import listen
from spin_ray.serving.progress import Progress

EMPTY: dict[str, Any] = {"engines": {}, "problems": {}, "troubles": {}, "failures": {}, "starting": {}}


def test_each_step_of_an_engine_is_told_once_and_ready_means_that_something_answers() -> None:
    progress = Progress(ServingConfig(port=9000))
    steps = ["its files are checked", "waits for a place", "placed, loads", "loaded, answers probes"]
    assert progress.lines(EMPTY) == ["http://127.0.0.1:9000 has the page; models start"]
    told = [progress.lines(EMPTY | {"starting": {"sft": step}}) for step in steps for _ in range(2)]
    assert told == [line for step in steps for line in ([f"sft: {step}"], [])]
    table = EMPTY | {"engines": {"sft": {}}, "problems": {"iter-0": "model.safetensors: differs from its digest"}}
    assert progress.lines(table) == [
        "iter-0: does not serve: model.safetensors: differs from its digest",
        "sft: ready",
        "http://127.0.0.1:9000 answers; Ctrl-C stops it",
    ]
    assert progress.lines(table | {"troubles": {"sft": ENDED}}) == ["sft: its engine has ended and starts again"]


def test_troubles_are_told_when_they_come_when_they_change_and_when_they_have_passed() -> None:
    progress = Progress(ServingConfig(port=9000))
    table = EMPTY | {"engines": {"sft": {}, "iter-0": {}}}
    progress.lines(table)
    out_of_memory = "its engine has ended (torch.OutOfMemoryError: CUDA out of memory) and starts again"
    stale = {"run": "cannot be followed ([Errno 116] Stale file handle: '/r/LATEST'); trying again"}
    now = table | {"troubles": {"iter-0": out_of_memory} | stale}
    assert progress.lines(now) == [f"iter-0: {out_of_memory}", f"run: {stale['run']}"]
    assert progress.lines(now) == []
    again = "its engine has ended and cannot start again (ValueError: no room for a cache); trying again"
    assert progress.lines(now | {"troubles": {"iter-0": again} | stale}) == [f"iter-0: {again}"]
    failed = {"sft": "an answer failed (torch.AcceleratorError: CUDA error: no kernel image is available)"}
    assert progress.lines(table | {"failures": failed}) == [
        "iter-0: ready",
        f"sft: {failed['sft']}",
        "run: is followed again",
    ]
    assert progress.lines(table | {"failures": failed}) == []
    assert progress.lines(table) == []


def test_iterates_that_share_an_engine_are_told_by_their_names() -> None:
    """All adapters of a run are answered by the engine of the model below them."""
    progress = Progress(ServingConfig(port=9000))
    engines = {name: {"app": "engine.sft.00"} for name in ("iter-0", "iter-1")}
    progress.lines(EMPTY)
    told = progress.lines(EMPTY | {"engines": engines})
    assert told == ["iter-0: ready", "iter-1: ready", "http://127.0.0.1:9000 answers; Ctrl-C stops it"]


def test_a_move_of_latest_is_told_beside_the_iterate_that_serves() -> None:
    progress = Progress(ServingConfig(port=9000))
    progress.lines(EMPTY | {"engines": {"sft": {}}})
    table = EMPTY | {"engines": {"sft": {}}, "problems": {"iter-0": "it does not load"}}
    assert progress.lines(table | {"starting": {"iter-0": "placed, loads"}}) == ["iter-0: placed, loads"]
    assert progress.lines(table) == ["iter-0: does not serve: it does not load"]


def test_a_port_that_the_system_chose_is_told() -> None:
    serving = ServingConfig(host="::1", port=0)
    with listen(serving) as port:
        front: Any = SimpleNamespace(port=port.getsockname()[1], answers=False)
        progress = Progress(serving, front)
        assert progress.lines(EMPTY) == []
        front.answers = True
        assert progress.lines(EMPTY) == [f"http://[::1]:{front.port} has the page; models start"]
    assert front.port > 0
