"""jobs/slurm, jobs/skypilot, cluster/compose.yaml: scripts run with stand-ins; files name what exists."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from spin_ray.__main__ import cli
from spin_ray.config.load import RECIPES, load_config
from tests.support.paths import ROOT

SBATCH = ROOT / "jobs" / "slurm" / "spin.sbatch"
SKYPILOT = yaml.safe_load((ROOT / "jobs" / "skypilot" / "spin.yaml").read_text())
COMPOSE = yaml.safe_load((ROOT / "cluster" / "compose.yaml").read_text())


def bash_accepts(script: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    if shellcheck := shutil.which("shellcheck"):
        found = subprocess.run(
            [shellcheck, "-s", "bash", "-"], input=script, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout


# Slurm

STAND_INS = {
    # Runs what it is given here, once, without its own options; says what it was given.
    "srun": """echo "srun $*" >> "$CALLS"
        while :; do case $1 in -w) shift 2;; --*) shift;; *) break;; esac; done
        exec "$@\"""",
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" != show ] || printf "first\\nsecond\\n"',
    "squeue": 'echo "$STATE"',
    "hostname": 'echo "127.0.1.1 fe80::1 10.0.0.7"',
    "ray": """echo "ray $* $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}" >> "$CALLS"
        case $2 in --head) echo first ;; *) echo "$JOINS" ;; esac >> "$CALLS.up"
        exec sleep 60""",
    "python": """echo python >> "$CALLS"
        xargs < "$CALLS.up\"""",
    "spin-ray": """trap 'echo "stopped in peace" >> "$CALLS"; exit 143' TERM
        echo "spin-ray $*" >> "$CALLS"
        if [ "$ENDS_WITH" = never ]; then for _ in $(seq 200); do sleep 0.05; done; fi
        exit "$ENDS_WITH\"""",
}
"""Programs of Slurm and Ray, and the driver: they note their calls in $CALLS, and the nodes of Ray in $CALLS.up."""


@pytest.fixture
def job(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)

    def start(**changes: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": os.environ["PATH"], "SPIN_RAY_VENV": str(programs.parent), "CALLS": str(tmp_path / "calls"),
            "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "64", "SLURM_GPUS_ON_NODE": "8", "STATE": "RUNNING", "ENDS_WITH": "0",
            "SPIN_RAY_POLL_S": "0.05", "JOINS": "second", **changes,
        }  # fmt: skip
        command = ["bash", str(SBATCH), "zephyr_7b", "--out", "/shared/run", "--train.workers=16"]
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return start


def calls(tmp_path: Path) -> str:
    return (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""


def wait_for(tmp_path: Path, words: str) -> None:
    deadline = time.monotonic() + 20
    while words not in calls(tmp_path):
        assert time.monotonic() < deadline, calls(tmp_path)
        time.sleep(0.02)


def test_the_slurm_script_is_a_script():
    bash_accepts(SBATCH.read_text())
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SBATCH.read_text(), re.MULTILINE))
    kind, _, seconds = options["signal"].partition("@")
    assert kind == "B:TERM", "the script, and not its steps, stops the driver"
    assert int(seconds) > 60 and {"requeue", "exclusive"} <= set(options) and options["open-mode"] == "append"


def test_a_job_on_two_nodes_starts_ray_with_a_token_and_the_driver_on_its_address(tmp_path, job):
    """The head's IPv4 address; 20000 + 12345 mod 10000 is the port; a token of 32 bytes in hex."""
    process = job(ENDS_WITH="never")
    wait_for(tmp_path, "ray start --address=")
    wait_for(tmp_path, "spin-ray run")
    process.terminate()
    process.communicate(timeout=30)
    noted = calls(tmp_path)
    each = "--num-cpus=64 --disable-usage-stats --block --num-gpus=8 token 64"
    assert f"ray start --head --node-ip-address=10.0.0.7 --port=22345 {each}" in noted
    assert f"ray start --address=10.0.0.7:22345 {each}" in noted
    assert "srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --exclude=first" in noted
    line = next(line for line in noted.splitlines() if line.startswith("spin-ray"))
    words = ["run", "zephyr_7b", "--out", "/shared/run", "--train.workers=16", "--cluster.address=10.0.0.7:22345"]
    assert line.split()[1:] == words
    overrides = dict(word.removeprefix("--").split("=") for word in words if "=" in word)
    assert load_config("zephyr_7b", overrides).cluster.address == "10.0.0.7:22345"


@pytest.mark.parametrize(
    ("ends_with", "restarts", "requeued"), [("1", "0", True), ("1", "3", False), ("2", "0", False), ("0", "0", False)]
)
def test_a_failed_stage_is_tried_again_and_bad_input_is_not(tmp_path, job, ends_with, restarts, requeued):
    process = job(ENDS_WITH=ends_with, SLURM_RESTART_COUNT=restarts, SLURM_JOB_NUM_NODES="1")
    process.communicate(timeout=30)
    assert process.returncode == int(ends_with)
    assert ("scontrol requeue 12345" in calls(tmp_path)) == requeued


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_before_the_time_limit_the_driver_stops_in_peace_and_the_job_is_requeued(tmp_path, job, state, requeued):
    """After scancel the job is completing: it stays ended."""
    process = job(ENDS_WITH="never", STATE=state, SLURM_JOB_NUM_NODES="1")
    wait_for(tmp_path, "spin-ray run")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert "stopped in peace" in calls(tmp_path)
    assert ("scontrol requeue 12345" in calls(tmp_path)) == requeued


def test_a_head_that_does_not_start_is_tried_again_without_a_driver(tmp_path, job):
    (tmp_path / "venv" / "bin" / "ray").write_text("#!/bin/bash\nexit 1\n")
    process = job(SLURM_JOB_NUM_NODES="1")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "head did not start on first" in output
    assert "spin-ray" not in calls(tmp_path) and "scontrol requeue 12345" in calls(tmp_path)


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("echo first", ["after 0 s Ray has 1 of 2 nodes (first); the job has first second"]),
        (
            "echo 'a wrong token' >&2; exit 1",
            ["after 0 s Ray has 0 of 1 nodes; the job has first second", "a wrong token"],
        ),
    ],
    ids=["second node", "head"],
)
def test_a_node_that_does_not_join_ends_the_wait_with_a_reason_and_the_job_is_tried_again(tmp_path, job, python, said):
    """The driver would refuse a cluster that lacks a node as bad input (2), which is not tried again."""
    (tmp_path / "venv" / "bin" / "python").write_text(f"#!/bin/bash\n{python}\n")
    process = job(SPIN_RAY_START_S="0")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and all(words in output.splitlines() for words in said), output
    assert "spin-ray run" not in calls(tmp_path) and "scontrol requeue 12345" in calls(tmp_path)


def test_a_job_may_begin_with_fewer_nodes(tmp_path, job):
    """Two of three, for a recipe with ``train.min_workers``."""
    process = job(SLURM_JOB_NUM_NODES="3", SPIN_RAY_MIN_NODES="2", JOINS="second")
    process.communicate(timeout=30)
    assert process.returncode == 0 and "spin-ray run" in calls(tmp_path)


def test_a_job_that_is_stopped_while_it_waits_for_its_nodes_starts_no_driver(tmp_path, job):
    process = job(JOINS="")
    wait_for(tmp_path, "ray start --address=")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and "spin-ray run" not in calls(tmp_path)
    assert "scontrol requeue 12345" in calls(tmp_path)


def test_an_environment_without_the_program_is_bad_input(tmp_path, job):
    """It would be tried again and again otherwise."""
    process = job(SPIN_RAY_VENV=str(tmp_path))
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and "has no spin-ray; run `make gpu-setup`" in output and not calls(tmp_path)


def test_a_head_that_dies_is_no_bad_input(tmp_path, job):
    """The driver finds no cluster and ends with 2; the job is tried again."""
    (tmp_path / "venv" / "bin" / "ray").write_text('#!/bin/bash\necho first > "$CALLS.up"; exit 1\n')
    process = job(SLURM_JOB_NUM_NODES="1", ENDS_WITH="2")
    process.communicate(timeout=30)
    assert process.returncode == 1 and "scontrol requeue 12345" in calls(tmp_path)


# SkyPilot

_TASK = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "setup", "run"}
"""Keys of a task that are used here (SkyPilot 0.14, sky/utils/schemas.py)."""


def test_the_skypilot_task_runs_what_exists():
    assert set(SKYPILOT) == _TASK
    assert set(SKYPILOT["resources"]) == {"accelerators", "disk_size", "use_spot", "job_recovery"}
    assert (ROOT / SKYPILOT["envs"]["RECIPE"]).is_file()
    config = load_config(ROOT / SKYPILOT["envs"]["RECIPE"])
    cards = int(SKYPILOT["resources"]["accelerators"].rpartition(":")[2]) * SKYPILOT["num_nodes"]
    assert config.train.workers == config.generation.replicas == cards
    for script in (SKYPILOT["setup"], SKYPILOT["run"]):
        bash_accepts(f"#!/bin/bash\n{script}")
    assert all((ROOT / lock).is_file() for lock in re.findall(r"-r (\S+)", SKYPILOT["setup"]))
    assert not any(SKYPILOT["secrets"].values()), "a secret is given with the command and written nowhere"


# Docker Compose


def interpolated(words: list[str]) -> list[str]:
    """Fills in the defaults of ``${NAME:-default}``."""
    return [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in words]


@pytest.mark.parametrize("name", ["cpu", "gpu", "serve"])
def test_a_service_builds_what_exists_and_calls_a_command_that_parses(name):
    service: dict[str, Any] = COMPOSE["services"][name]
    build = service["build"]
    assert (ROOT / "cluster" / build["context"] / build["dockerfile"]).is_file()
    assert re.search(rf"^ARG {next(iter(build['args']))}=", (ROOT / build["dockerfile"]).read_text(), re.MULTILINE)
    assert service["shm_size"] == "12gb" and service["cap_drop"] == ["ALL"]
    program, command, what, *arguments = interpolated(service["command"])
    assert program == "spin-ray" and CliRunner().invoke(cli, [command, "--help"]).exit_code == 0
    overrides = dict(word.removeprefix("--").split("=", 1) for word in arguments if "=" in word)
    recipe = RECIPES / (f"{what}.yaml" if command == "run" else "smoke.yaml")
    config = load_config(recipe, overrides)
    assert bool(config.train.resources.gpus) == ("deploy" in service)
    copied = re.findall(r"^COPY (\S+) ", (ROOT / build["dockerfile"]).read_text(), re.MULTILINE)
    assert "jobs/recipes/" in copied, "the package's recipes are a link to this folder"


def test_what_serves_beyond_its_container_asks_for_keys_and_a_token():
    service = COMPOSE["services"]["serve"]
    assert any(word.startswith("--serving.keys=") for word in service["command"])
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
