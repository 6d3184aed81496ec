"""What trackers are told is in Ray's Prometheus endpoint, too, under the same names; scraped as Prometheus does."""

import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import ray
from prometheus_client.parser import text_string_to_metric_families

from spin_ray.config.sections import TrackingConfig
from spin_ray.report.tracking import metric_name, points, set_gauges, step_values, track
from spin_ray.run_dir.events import read_json_lines
from tests.support.made_up_run import made_up_run

EXPORT_S = 60
"""Ray hands gauges to the node's agent every 10 s."""


def scrape(run: str) -> dict[str, float]:
    """Gauges of a run on this node, by name without Ray's prefix."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples if sample.labels.get("run") == run]
    return {sample.name.removeprefix("ray_"): sample.value for sample in samples}


def test_prometheus_has_the_newest_of_what_the_trackers_have(tmp_path: Path) -> None:
    """Every point that TensorBoard, MLflow and W&B are given: training's last step and the newest evaluation."""
    run = made_up_run(tmp_path / "scraped", iterations=2, done=2)
    log = read_json_lines(run.storage, "iter_001/train_log.jsonl")
    set_gauges(run.storage.name, step_values(log[-1]))  # as the driver does while it watches training
    track(run, run.config().model_copy(update={"tracking": TrackingConfig(tensorboard=False)}), 2)

    expected = {metric_name(point.name): point.value for point in points(run, 2)}  # later steps replace earlier
    assert {"spin_ray_train_loss", "spin_ray_eval_answer_accuracy", "spin_ray_eval_kl_to_base"} <= expected.keys()
    deadline = time.monotonic() + EXPORT_S
    found: dict[str, float] = {}
    while not expected.keys() <= found.keys() and time.monotonic() < deadline:
        time.sleep(1)
        with suppress(OSError):  # one slow or lost answer
            found = scrape("scraped")
    assert {name: found.get(name) for name in expected} == expected
    assert (found["spin_ray_progress_step"], found["spin_ray_progress_steps"]) == (5, 5)
    assert found["spin_ray_eval_iterate"] == 2
