"""What trackers are told, read back with their own readers."""

import glob
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import ray
from ray.util.metrics import Gauge

from spin_ray.config.sections import TrackingConfig
from spin_ray.errors import ConfigError
from spin_ray.report import tracking
from spin_ray.report.tracking import check_trackers, points, set_gauges, step_values, track, track_all
from tests.support.made_up_run import made_up_run


@pytest.fixture
def run(tmp_path):
    """θ_0 and θ_1; iteration 0 had five steps."""
    return made_up_run(tmp_path / "run", iterations=2, done=2)


def configured(run, **trackers):
    return run.config().model_copy(update={"tracking": TrackingConfig.model_validate(trackers)})


def test_training_counts_its_steps_through_all_iterations_and_evaluations_count_iterates(run):
    """Five steps each: iteration 1 goes on at step 5; its loss starts at ln 2."""
    found = {(point.name, point.step): point.value for point in points(run, 2)}
    assert found["train/loss", 5] == pytest.approx(0.6931, abs=1e-4)
    assert found["eval/against_opponent.loss", 2] == pytest.approx(0.5)
    assert found["eval/answer_accuracy", 2] == pytest.approx(0.45)
    assert ("train/loss", 4) not in found


def test_the_last_step_is_as_many_as_there_are():
    values = step_values({"step": 63, "of": 64, "loss": 0.5})
    assert values == {"train/loss": 0.5, "progress/step": 64.0, "progress/steps": 64.0}


def test_tensorboard_reads_back_what_was_written(run):
    config = configured(run)
    for iterate in (0, 1, 2, 1):  # a resumed driver passes the earlier ones again
        track(run, config, iterate)
    files = sorted(glob.glob(str(run.storage.path("tensorboard/*tfevents*"))))
    found = [(value.tag, event.step, value.simple_value) for file in files for event, value in read_events(file)]
    accuracies = [(step, round(value, 4)) for tag, step, value in found if tag == "eval/answer_accuracy"]
    assert sorted(accuracies) == [(0, 0.25), (1, 0.35), (2, 0.45)]
    assert sorted(step for tag, step, _ in found if tag == "train/margin") == list(range(10))


def read_events(file: str):
    """Records of a TFRecord file: length (8 bytes), checksum (4), data, checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    data = Path(file).read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        yield from ((event, value) for value in event.summary.value)
        data = data[16 + length :]


def test_mlflow_reads_back_what_was_written(run):
    client = pytest.importorskip("mlflow").MlflowClient
    config = configured(run, tensorboard=False, mlflow={})
    for iterate in (0, 1, 2, 1):
        track(run, config, iterate)
    reader = client(run.storage.path("mlruns").as_uri())
    experiment = reader.get_experiment_by_name("spin_ray").experiment_id
    [found] = reader.search_runs([experiment])
    history = reader.get_metric_history(found.info.run_id, "eval/answer_accuracy")
    assert [(it.step, it.value) for it in history] == [(0, 0.25), (1, pytest.approx(0.35)), (2, pytest.approx(0.45))]
    assert len(reader.get_metric_history(found.info.run_id, "train/loss")) == 10
    assert found.data.params["objective.beta"] == "0.5"


@pytest.mark.slow
def test_weights_and_biases_gets_one_offline_run(run, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = configured(run, tensorboard=False, wandb={})
    for iterate in (0, 1):
        track(run, config, iterate)
    wandb.teardown()  # its process writes the end of a file only after finish()
    files = sorted(glob.glob(str(run.storage.path("wandb/offline-run-*/*.wandb"))))
    assert len({file.rpartition("-")[2] for file in files}) == 1  # both of the same run id
    rows = [row for file in files for row in wandb_history(Path(file).read_bytes())]
    found = {
        (name, int(row["step" if name.startswith("train/") else "iterate"])): value
        for row in rows
        for name, value in row.items()
        if "/" in name
    }
    expected = {(point.name, point.step): point.value for iterate in (0, 1) for point in points(run, iterate)}
    assert found == pytest.approx(expected)


def wandb_history(data: bytes):
    """Logged rows of a .wandb file: after 7 bytes, blocks of 32 KiB of (checksum 4, size 2, kind 1, data)."""
    from wandb.proto.wandb_internal_pb2 import Record

    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            found = Record.FromString(record)
            if found.HasField("history"):
                yield {item.nested_key[0]: json.loads(item.value_json) for item in found.history.item}
            record = b""


def test_a_tracker_that_fails_is_a_warning_and_is_told_again(run, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(tracking, "_log_tensorboard", fail)
    track(run, configured(run), 0)
    assert "tensorboard: could not log sft (OSError: no room)" in caplog.text
    monkeypatch.undo()
    track(run, configured(run), 0)
    assert run.storage.exists("tensorboard")


@pytest.mark.parametrize(
    ("trackers", "told"),
    [
        (
            {"mlflow": {"uri": "http://127.0.0.1:9"}},
            r"tracking\.mlflow\.uri: http://127\.0\.0\.1:9 cannot be used \(Connection refused\); correct it",
        ),
        ({"mlflow": {"uri": "foo://bar"}}, r"tracking\.mlflow\.uri: foo://bar cannot be used \(.*foo://bar"),
        ({"wandb": {"mode": "online"}}, r"tracking\.wandb\.mode: online needs a key; set WANDB_API_KEY"),
        ({"wandb": {}, "mlflow": {}}, None),
    ],
)
def test_a_tracker_that_cannot_be_used_is_told_at_the_start(run, monkeypatch, tmp_path, trackers, told):
    """wandb asked a terminal for the key when the first iterate was published, and waited."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    if told is None:
        check_trackers(configured(run, **trackers))
        return
    with pytest.raises(ConfigError, match=told):
        check_trackers(configured(run, **trackers))


def test_a_server_of_mlflow_that_hangs_is_asked_twice_and_told_in_a_few_words(run, monkeypatch, caplog):
    """A run asks it longer: it may be busy for a moment."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError) as caught:
            check_trackers(configured(run, mlflow={"uri": uri}))
        asked = 0
        server.setblocking(False)
        with suppress(BlockingIOError):
            while server.accept():
                asked += 1
    assert (
        str(caught.value) == f"tracking.mlflow.uri: {uri} cannot be used (timed out); correct it, or start its server"
    )
    assert asked == 2 and not caplog.text
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_folder_of_mlflow_is_used_and_what_a_tracker_lacks_of_a_finished_run_is_logged(run, tmp_path):
    client = pytest.importorskip("mlflow").MlflowClient
    config = configured(run, tensorboard=False, mlflow={"uri": str(tmp_path / "elsewhere")})
    check_trackers(config)
    track_all(run, config, 2)
    reader = client(str(tmp_path / "elsewhere"))
    [found] = reader.search_runs([reader.get_experiment_by_name("spin_ray").experiment_id])
    assert len(reader.get_metric_history(found.info.run_id, "eval/answer_accuracy")) == 3


def test_a_tracker_that_fails_is_tried_once_for_a_finished_run(run, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "_log_mlflow", lambda *_: 1 / 0)
    track_all(run, configured(run, tensorboard=False, mlflow={}), 2)
    assert caplog.text.count("could not log") == 1


def test_no_tracker_no_files(run):
    track(run, configured(run, tensorboard=False), 0)
    assert not run.storage.exists("tensorboard")
    assert not run.storage.exists("tracking.json")


def test_a_gauge_of_a_run_with_any_name_is_set(monkeypatch):
    """Ray takes ASCII alone."""
    set_to: list[tuple[float, dict[str, str]]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(Gauge, "set", lambda gauge, value, tags: set_to.append((value, tags)))
    set_gauges("über mich", {"train/loss": 0.5, "train/margin": float("nan")})
    assert set_to == [(0.5, {"run": "\\xfcber mich"})]
