"""What the user is told while engines start."""

from types import SimpleNamespace
from typing import Any

from spin_ray.config.sections import ServingConfig
from spin_ray.serving.progress import Progress


def application(status: str, **replicas: int) -> Any:
    deployment = SimpleNamespace(replica_states=replicas)
    return SimpleNamespace(status=SimpleNamespace(value=status), deployments={"engine": deployment})


def test_each_step_of_an_engine_is_told_once_and_ready_means_that_something_answers() -> None:
    progress = Progress(ServingConfig(port=9000))
    table: dict[str, Any] = {"engines": {}, "problems": {}, "down": []}
    steps = [application("DEPLOYING"), application("DEPLOYING", STARTING=1), application("RUNNING", RUNNING=1)]
    told = [progress.lines({"engine.sft.00": step}, table) for step in steps for _ in range(2)]
    assert told == [["sft: waits for a place"], [], ["sft: placed, loads"], [], ["sft: loaded, answers probes"], []]
    running = {"engine.sft.00": steps[-1]}
    table |= {"engines": {"sft": {}}, "problems": {"iter-0": "model.safetensors: differs from its digest"}}
    assert progress.lines(running, table) == [
        "iter-0: does not serve: model.safetensors: differs from its digest",
        "sft: ready",
        "http://127.0.0.1:9000 answers; Ctrl-C stops it",
    ]
    table["down"] = ["sft"]
    assert progress.lines(running, table) == ["sft: its engine has ended and starts again"]


def test_iterates_that_share_an_engine_are_told_by_their_names() -> None:
    """All adapters of a run are answered by the engine of the model below them."""
    progress = Progress(ServingConfig(port=9000))
    engines = {name: {"app": "engine.sft.00"} for name in ("iter-0", "iter-1")}
    running = {"engine.sft.00": application("RUNNING", RUNNING=1)}
    told = progress.lines(running, {"engines": engines, "problems": {}, "down": []})
    assert told == ["iter-0: ready", "iter-1: ready", "http://127.0.0.1:9000 answers; Ctrl-C stops it"]
