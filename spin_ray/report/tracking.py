"""An iterate's numbers for TensorBoard, MLflow, Weights & Biases and Prometheus, under the same names.

    train/loss, …                    at the optimizer step, counted through all iterations
    eval/against_opponent.loss, …    at the iterate's number: keys of eval.json

RUN/tracking.json lists what was logged. A tracker that fails never ends a run. In Prometheus ``train/loss`` is
``ray_spin_ray_train_loss{run="NAME"}``.
"""

import json
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from spin_ray.config.recipe import SpinConfig, flatten
from spin_ray.config.sections import WandbConfig
from spin_ray.errors import ConfigError, first_line
from spin_ray.report.measures import MEASURES
from spin_ray.report.redaction import hide
from spin_ray.run_dir.names import iterate_name
from spin_ray.run_dir.run_dir import RunDir

logger = logging.getLogger(__name__)

STATE = "tracking.json"
TENSORBOARD = "tensorboard"
NOT_LOGGED = ("step", "of")
"""Keys of train_log.jsonl that are no measure."""


class Point(NamedTuple):
    name: str
    step: int
    value: float


def check_trackers(config: SpinConfig) -> None:
    """Checks that MLflow answers, and that Weights & Biases would not ask for a key.

    Raises:
        ConfigError: a tracker cannot be used.
    """
    uri = config.tracking.mlflow.uri if config.tracking.mlflow else None
    if uri is not None:
        try:
            with _asked_briefly():
                _mlflow_client(uri).search_experiments(max_results=1)
        except Exception as error:  # of MLflow, its network or its database
            raise ConfigError(
                f"tracking.mlflow.uri: {uri} cannot be used ({_innermost(error)}); correct it, or start its server"
            ) from error
    if config.tracking.wandb:
        _check_key(config.tracking.wandb)


@contextmanager
def _asked_briefly() -> Iterator[None]:
    """Lets MLflow try twice, 10 s each, unless the environment says otherwise, and without urllib3's lines."""
    brief = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    ours, urllib3 = {name: text for name, text in brief.items() if name not in os.environ}, logging.getLogger("urllib3")
    level = urllib3.level
    os.environ.update(ours)
    urllib3.setLevel(logging.ERROR)
    try:
        yield
    finally:
        urllib3.setLevel(level)
        for name in ours:
            del os.environ[name]


def _innermost(error: BaseException) -> str:
    """Returns the system's reason, such as ``Connection refused``; without one the error's own first line."""
    found, each = None, error
    while each is not None:
        found, each = each if isinstance(each, OSError) else found, each.__cause__ or each.__context__
    return (found.strerror if found else None) or first_line(found or error).strip()


def _check_key(settings: WandbConfig) -> None:
    import wandb

    if settings.mode == "offline" or wandb.run is not None:
        return
    try:
        found = wandb.login(prompt=False)
    except Exception as error:  # of W&B or its network
        raise ConfigError(f"tracking.wandb.mode: online cannot be used ({first_line(error).strip()})") from error
    if not found:
        raise ConfigError(
            "tracking.wandb.mode: online needs a key; set WANDB_API_KEY (and not WANDB_MODE), run `wandb login` first, "
            "or set offline"
        )


def track_all(run: RunDir, config: SpinConfig, newest: int) -> None:
    """Logs the iterates up to ``newest`` that a tracker lacks, until it fails, as after its settings were corrected."""
    failed: set[str] = set()
    for iterate in range(newest + 1):
        failed |= _log(run, config, iterate, failed)


def track(run: RunDir, config: SpinConfig, iterate: int) -> None:
    """Logs θ_iterate to each configured tracker that lacks it, and to Prometheus."""
    _log(run, config, iterate)
    newest = {point.name: point.value for point in _evaluation_points(run, iterate)}
    set_gauges(run.storage.name, newest | {"eval/iterate": float(iterate)})


def _log(run: RunDir, config: SpinConfig, iterate: int, without: Collection[str] = ()) -> set[str]:
    """Returns the trackers that failed."""
    name, state, failed = iterate_name(iterate), _read_state(run), set[str]()
    for tracker, log in _trackers(config).items():
        mine = state.setdefault(tracker, {"logged": []})
        if name in mine["logged"] or tracker in without:
            continue
        try:
            mine |= log(run, config, list(points(run, iterate)), mine)
        except Exception as error:  # whatever a tracker's client, network or disk does, the run goes on
            logger.warning("%s: could not log %s (%s: %s)", tracker, name, type(error).__name__, first_line(error))
            failed.add(tracker)
            continue
        mine["logged"].append(name)
        run.storage.replace(STATE, json.dumps(state, indent=1).encode())
    return failed


def points(run: RunDir, iterate: int) -> Iterator[Point]:
    """Yields every number of θ_iterate, training first."""
    logs = [run.train_log(iterate_name(number)) for number in range(iterate + 1)]
    before = sum(len(log) for log in logs[:-1])
    for line in logs[-1]:
        for key, value in line.items():
            if key not in NOT_LOGGED:
                yield Point(f"train/{key}", before + line["step"], float(value))
    yield from _evaluation_points(run, iterate)


def _evaluation_points(run: RunDir, iterate: int) -> Iterator[Point]:
    evaluation = run.evaluation(iterate) or {}
    for measure in MEASURES:
        if (value := measure.of(evaluation)) is not None:
            yield Point(f"eval/{measure.key}", iterate, float(value))


Log = Callable[[RunDir, SpinConfig, list[Point], dict[str, Any]], dict[str, Any]]
"""Function that logs points to a tracker and returns additions to its state, the last argument."""


def _trackers(config: SpinConfig) -> dict[str, Log]:
    wanted: dict[str, tuple[bool, Log]] = {
        "tensorboard": (config.tracking.tensorboard, _log_tensorboard),
        "mlflow": (config.tracking.mlflow is not None, _log_mlflow),
        "wandb": (config.tracking.wandb is not None, _log_wandb),
    }
    return {name: log for name, (is_wanted, log) in wanted.items() if is_wanted}


def _log_tensorboard(run: RunDir, config: SpinConfig, found: list[Point], state: dict[str, Any]) -> dict[str, Any]:
    from tensorboardX import SummaryWriter

    # Files are named by the second; the suffix keeps iterates of the same second apart.
    suffix = f".{len(state['logged'])}"
    with SummaryWriter(str(run.storage.path(TENSORBOARD)), filename_suffix=suffix) as writer:
        for point in found:
            writer.add_scalar(point.name, point.value, point.step)
    return {}


def _log_mlflow(run: RunDir, config: SpinConfig, found: list[Point], state: dict[str, Any]) -> dict[str, Any]:
    from mlflow.entities import Metric, Param

    settings = config.tracking.mlflow
    assert settings is not None
    client = _mlflow_client(settings.uri or run.storage.path("mlruns").as_uri())
    run_id = state.get("run_id")
    if run_id is None:
        known = client.get_experiment_by_name(settings.experiment)
        experiment = known.experiment_id if known else client.create_experiment(settings.experiment)
        run_id = client.create_run(experiment, run_name=run.storage.name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in _settings(config).items()]
        for start in range(0, len(params), 100):  # MLflow takes at most 100 params in a call
            client.log_batch(run_id, params=params[start : start + 100])
    now = int(time.time() * 1000)
    metrics = [Metric(point.name, point.value, now, point.step) for point in found]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    return {"run_id": run_id}


def _mlflow_client(uri: str | None) -> Any:
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow refuses a folder as its store without this
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own seven make a run wait for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _log_wandb(run: RunDir, config: SpinConfig, found: list[Point], state: dict[str, Any]) -> dict[str, Any]:
    import wandb

    settings = config.tracking.wandb
    assert settings is not None
    _check_key(settings)
    run_id = state.get("run_id") or uuid.uuid4().hex[:8]
    client = wandb.init(
        project=settings.project, id=run_id, name=run.storage.name, mode=settings.mode, resume="allow",
        dir=str(run.storage.root), config=_settings(config), settings=wandb.Settings(silent=True),
    )  # fmt: skip
    # W&B wants one axis that only grows. Here there are two axes, so each point carries its own.
    client.define_metric("train/*", step_metric="step")
    client.define_metric("eval/*", step_metric="iterate")
    for axis, prefix in (("step", "train/"), ("iterate", "eval/")):
        rows: dict[int, dict[str, float]] = {}
        for point in found:
            if point.name.startswith(prefix):
                rows.setdefault(point.step, {})[point.name] = point.value
        for place, values in rows.items():
            client.log({axis: place, **values})
    client.finish()
    return {"run_id": run_id}


def metric_name(name: str) -> str:
    """Returns the gauge's name, e.g. ``spin_ray_train_loss``."""
    return f"spin_ray_{re.sub('[^a-zA-Z0-9]', '_', name)}"


def step_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns a train_log.jsonl line's numbers by name; ``progress/step`` counts from 1."""
    named = {f"train/{key}": float(value) for key, value in line.items() if key not in NOT_LOGGED}
    return named | {"progress/step": float(line["step"] + 1), "progress/steps": float(line["of"])}


def set_gauges(run: str, values: Mapping[str, float]) -> None:
    """Sets gauges of a run. Does nothing without Ray, which exports them and takes ASCII alone in tags."""
    import ray
    from ray.util.metrics import Gauge

    if not ray.is_initialized():
        return
    tags = {"run": run.encode("ascii", "backslashreplace").decode()}
    for name, value in values.items():
        if math.isfinite(value):
            Gauge(metric_name(name), f"{name} of spin_ray", ("run",)).set(value, tags=tags)


def _settings(config: SpinConfig) -> dict[str, Any]:
    return flatten(hide(config.model_dump(mode="json")))


def _read_state(run: RunDir) -> dict[str, Any]:
    """Returns what was logged; nothing, with a warning, if the file is damaged."""
    content = run.storage.find(STATE)
    if content is None:
        return {}
    try:
        state = json.loads(content)
        if all(isinstance(mine["logged"], list) for mine in state.values()):
            return state
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    logger.warning("%s: is damaged; every iterate is logged again", run.storage.where(STATE))
    return {}
