"""The application of cluster/rayservice.yaml, deployed by `serve deploy` on a real Ray that asks for a token."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import yaml

from spin_ray.run_dir.run_dir import RunDir
from spin_ray.serving.access import new_key
from tests.support.paths import ROOT
from tests.support.ray_head import Head, free_port, ray_head
from tests.support.served import ANSWER_S, START_S
from tests.support.tiny_runs import make_run

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

Found = TypeVar("Found")
SECRET = "the word is swordfish"


@dataclass(frozen=True)
class Deployed:
    head: Head
    run: RunDir
    url: str
    key: str

    config: Path
    """File of ``serve deploy``."""

    def deploy(self) -> None:
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(self.config), "-a", self.head.dashboard]
        done = subprocess.run(
            command, env=self.head.variables, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def applications(self) -> dict[str, Any]:
        """Returns what KubeRay asks for."""
        url = f"{self.head.dashboard}/api/serve/applications/"
        asked = httpx.get(url, headers=self.head.authorization, timeout=ANSWER_S)
        return asked.raise_for_status().json()["applications"]

    def replicas(self) -> dict[str, list[str]]:
        """Returns the states of the replicas of each engine."""
        return {
            name: [replica["state"] for each in app["deployments"].values() for replica in each["replicas"]]
            for name, app in self.applications().items()
            if name.startswith("engine.sft.")
        }

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=ANSWER_S)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Deploys ``sft`` on two engines, with one key."""
    folder = tmp_path_factory.mktemp("deployed")
    run = make_run(folder / "run", iterates=0)
    key, line = new_key("alice")
    (folder / "keys").write_text(line)
    (folder / "keys").chmod(0o600)
    service = next(yaml.safe_load_all((ROOT / "cluster" / "rayservice.yaml").read_text()))
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    config["applications"][0]["args"] |= {
        "run": str(run.storage.root), "serving.models": ["sft"], "serving.keys": str(folder / "keys"),
        "serving.resources": {"cpus": 1}, "serving.replicas": 2,
    }  # fmt: skip
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with ray_head(environment | {"RAY_metrics_report_interval_ms": "1000"}, cpus=4) as head:
        url = f"http://127.0.0.1:{config['http_options']['port']}"
        deployed = Deployed(head, run, url, key, folder / "serve.yaml")
        deployed.deploy()
        until(lambda: {app["status"] for app in deployed.applications().values()} == {"RUNNING"}, START_S)
        until(lambda: httpx.get(f"{url}/readyz").status_code == 200, START_S)  # KubeRay sends clients here now
        yield deployed


def until(look: Callable[[], Found], limit_s: float) -> Found:
    """Calls ``look`` until it finds something, and returns that."""
    deadline = time.monotonic() + limit_s
    while True:
        found = None
        try:
            found = look()
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {limit_s:g} s"
        time.sleep(0.5)


def test_who_has_the_key_is_answered_and_nobody_else(deployed: Deployed) -> None:
    asked: Any = [{"role": "user", "content": SECRET}]
    answer = deployed.client().chat.completions.create(model="sft", messages=asked, max_tokens=4, temperature=0)
    assert answer.usage and answer.usage.completion_tokens == 4
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{deployed.url}/v1", api_key="sr-guess", max_retries=0).models.list()


def test_as_many_engines_run_as_the_config_says(deployed: Deployed) -> None:
    assert list(deployed.replicas().values()) == [["RUNNING", "RUNNING"]]


@pytest.mark.parametrize(
    "path",
    ["/load", "/metrics", "/tokenize", "/collective_rpc", "/v1/load_lora_adapter", "/reset_prefix_cache", "/sleep"],
)
def test_no_route_steers_an_engine(deployed: Deployed, path: str) -> None:
    headers = {"Authorization": f"Bearer {deployed.key}"}
    assert httpx.post(f"{deployed.url}{path}", json={}, headers=headers, timeout=ANSWER_S).status_code == 404


def test_prometheus_reads_what_was_answered_from_rays_agent(deployed: Deployed) -> None:
    deployed.client().completions.create(model="sft", prompt="1", max_tokens=1)
    httpx.get(f"{deployed.url}/v1/models", timeout=ANSWER_S)

    def samples() -> dict[str, float]:
        """Returns values by name and labels of ours, once both requests have been counted."""
        text = httpx.get(f"http://127.0.0.1:{deployed.head.metrics_port}/metrics").text
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith(("ray_spin_ray_", "ray_vllm", "ray_serve_num_http")):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        counted = [name for name in found if "ray_spin_ray_requests_total" in name]
        told = " ".join(counted)
        return found if 'model="sft"' in told and 'status="200"' in told and 'status="401"' in told else {}

    names = {name.partition("{")[0] for name in until(samples, 60)}
    assert {"ray_spin_ray_requests_total", "ray_spin_ray_request_seconds_bucket"} <= names
    assert "ray_spin_ray_first_output_seconds_bucket" in names
    assert [name for name in names if name.startswith("ray_serve_num_http")], "Ray Serve's own"
    assert [name for name in names if name.startswith("ray_vllm")], "vLLM's own"


def test_the_access_log_has_who_and_what_but_not_what_was_said(deployed: Deployed) -> None:
    asked: Any = [{"role": "user", "content": SECRET}]
    deployed.client().chat.completions.create(model="sft", messages=asked, max_tokens=4)
    lines = until(lambda: access_lines(deployed.head.folder), 20)
    assert {"method", "path", "status", "seconds", "key", "model", "stream", "request_id"} == set(lines[-1])
    assert (lines[-1]["key"], lines[-1]["model"], lines[-1]["status"]) == ("alice", "sft", 200)
    logs = "".join(log.read_text(errors="replace") for log in deployed.head.folder.glob("session_*/logs/serve/*"))
    assert "sft serves" in logs, "the keeper's log is written after vLLM was imported, too"
    assert SECRET not in logs and deployed.key not in logs


def test_a_client_of_rays_proxy_that_hangs_up_ends_its_whole_answer(deployed: Deployed) -> None:
    asked = {"model": "sft", "messages": [{"role": "user", "content": "a"}], "max_tokens": 200, "n": 8}

    def hung_up() -> list[dict[str, Any]]:
        """Hangs up; the ingress logs nothing of a request that Ray's proxy did not hand over in time."""
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{deployed.url}/v1/chat/completions", json=asked, headers={"Authorization": f"Bearer {deployed.key}"},
                timeout=httpx.Timeout(ANSWER_S, read=0.1),
            )  # fmt: skip
        time.sleep(1)
        return [line for line in access_lines(deployed.head.folder) if line["status"] == 499]

    until(hung_up, 30)


def access_lines(folder: Path) -> list[dict[str, Any]]:
    """Returns the ingress's lines about chat completions."""
    logs = [log.read_text() for log in folder.glob("session_*/logs/serve/*ingress*")]
    found = [line[line.index('{"method"') :] for text in logs for line in text.splitlines() if '{"method"' in line]
    lines = [json.loads(line) for line in found]
    return [line for line in lines if line["path"] == "/v1/chat/completions"]


def test_changed_settings_reach_the_engines_while_clients_are_answered(deployed: Deployed) -> None:
    """KubeRay puts a changed ``serveConfigV2`` into the same cluster."""
    (earlier,) = deployed.replicas()
    config = yaml.safe_load(deployed.config.read_text())
    config["applications"][0]["args"] |= {"serving.replicas": 1, "serving.request_timeout_s": 33}
    deployed.config.write_text(yaml.safe_dump(config))
    deployed.deploy()

    def replaced() -> bool:
        answer = deployed.client().with_options(timeout=30).completions.create(model="sft", prompt="1", max_tokens=1)
        assert answer.choices
        engines = deployed.replicas()
        return earlier not in engines and list(engines.values()) == [["RUNNING"]]

    until(replaced, START_S)
