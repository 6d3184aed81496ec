"""cluster/*.yaml: fits the schemas of KubeRay and Kubernetes, unknown fields refused, and what schemas cannot say."""

import json
import os
import re
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from spin_ray.config.load import load_config, override
from spin_ray.config.sections import ServingConfig
from spin_ray.runtime.placement import demands, placeable
from tests.support.paths import ROOT

CLUSTER = ROOT / "cluster"
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-crds"))
KUBERNETES = "1.34"
MANIFESTS = ("raycluster", "rayjob", "rayservice")
QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|[kMGTP]i?)?$")


@cache
def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text()))


def ray_object(name: str) -> dict[str, Any]:
    return json.loads(json.dumps(objects(name)[0]))  # anchors make shared objects: undo that


def cluster_spec(name: str) -> dict[str, Any]:
    """The RayCluster inside."""
    spec = ray_object(name)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def templates(name: str) -> list[dict[str, Any]]:
    """Pod templates, the head's first."""
    spec = cluster_spec(name)
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def containers(name: str) -> list[dict[str, Any]]:
    return [container for template in templates(name) for container in template["spec"]["containers"]]


# Schemas


def strict(schema: Any) -> Any:
    """The CRD's schema as JSON Schema: unknown fields refused, int-or-string understood."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if closed.pop("x-kubernetes-int-or-string", False):
        closed.pop("anyOf", None)
        closed["type"] = ["integer", "string"]
    if isinstance(closed.get("properties"), dict) and "type" in closed:
        closed.setdefault("additionalProperties", False)
    return closed


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    file = CRDS / f"ray.io_{name}s.yaml"
    if not file.exists():
        pytest.skip(f"{file} is not here: KubeRay's CRDs, or set KUBERAY_CRDS to their folder")
    versions = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    schema = strict(next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def problems(name: str, manifest: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in validator(name).iter_errors(manifest)]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_fits_kuberay_s_schema(name: str) -> None:
    assert problems(name, ray_object(name)) == []


MISTAKES = [
    ("raycluster", "spec.workerGroupSpecs.0.maxReplica", 3),
    ("raycluster", "spec.autoscalerOptions.version", "v3"),
    ("raycluster", "spec.authOptions.mode", "tokens"),
    ("raycluster", "spec.headGroupSpec.template.spec.terminationGracePeriodSecond", 1),
    ("raycluster", "spec.headGroupSpec.template.spec.containers.0.resources.limits.cpu", [4]),
    ("rayjob", "spec.backoffLimits", 3),
    ("rayjob", "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.volumeMounts.0.mountpath", "/x"),
    ("rayjob", "spec.rayClusterSpec.workerGroupSpecs.0.replicas", "one"),
    ("rayservice", "spec.serveConfig", "applications: []"),
    ("rayservice", "spec.rayClusterConfig.headGroupSpec.template.spec.containers.0.ports.0.containerPort", "8265"),
]


@pytest.mark.parametrize(("name", "path", "value"), MISTAKES)
def test_a_wrong_field_is_found(name: str, path: str, value: Any) -> None:
    """At the top, in the cluster, in the pods and in the containers."""
    manifest = ray_object(name)
    at: Any = manifest
    *parents, field = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        at = at[part]
    at[field] = value
    assert len(problems(name, manifest)) == 1


def pods_and_others() -> list[Any]:
    found = [
        pytest.param(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}, id=name
        )
        for name in MANIFESTS
        for template in templates(name)
    ]
    others = [other for name in ("base", *MANIFESTS) for other in objects(name) if "ray.io" not in other["apiVersion"]]
    return found + [pytest.param(other, id=other["kind"]) for other in others]


@pytest.mark.parametrize("manifest", pods_and_others())
def test_pods_and_plain_objects_fit_kubernetes_own_schemas(manifest: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest | {"specs": {}}, KUBERNETES, strict=True)


# What the schemas cannot say


@pytest.mark.parametrize("name", MANIFESTS)
def test_ray_is_the_locked_version_everywhere(name: str) -> None:
    locks = [(ROOT / "requirements" / name).read_text() for name in ("cpu.lock", "gpu.lock")]
    (locked,) = {version for lock in locks for version in re.findall(r"^ray==(\S+)", lock, re.MULTILINE)}
    assert cluster_spec(name)["rayVersion"] == locked
    assert {container["image"].rpartition("-")[2] for container in containers(name)} == {f"ray{locked}"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_requests_are_limits_and_quantities_are_quantities(name: str) -> None:
    """Guaranteed pods: what Ray believes a node has is what it has, and such pods are evicted last."""
    for container in containers(name):
        amounts = container["resources"]
        assert amounts["requests"] == amounts["limits"] and {"cpu", "memory"} <= set(amounts["limits"])
        assert all(QUANTITY.match(str(amount)) for amount in amounts["limits"].values())


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_head_runs_no_work_and_the_token_is_asked_for(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert all(template["spec"]["restartPolicy"] == "Never" for template in templates(name)), "autoscaler v2 needs it"


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_run_as_a_user_without_privileges(name: str) -> None:
    for template in templates(name):
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"] and pod["runAsUser"] > 0 and pod["seccompProfile"]["type"] == "RuntimeDefault"
    for container in containers(name):
        own = container["securityContext"]
        assert not own["allowPrivilegeEscalation"] and own["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_mount_has_its_volume_and_shared_memory_is_big(name: str) -> None:
    claims = {other["metadata"]["name"] for other in objects("base") if other["kind"] == "PersistentVolumeClaim"}
    for template in templates(name):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] in claims
        shared_memory = volumes["shm"]["emptyDir"]
        assert shared_memory["medium"] == "Memory", "/dev/shm of a container is 64 MB otherwise"
        assert int(shared_memory["sizeLimit"].removesuffix("Gi")) * 2**30 * 0.9 > 10e9, "Ray has its objects on disk"


def test_no_two_manifests_give_their_services_one_name() -> None:
    """KubeRay names the head's service after the object and changes the selector of one that is there."""
    names = [each["metadata"]["name"] for name in MANIFESTS for each in objects(name) if each["kind"].startswith("Ray")]
    assert len(set(names)) == len(names) == len(MANIFESTS)


def test_an_old_cluster_stays_for_the_longest_answer() -> None:
    (service,) = [each for each in objects("rayservice") if each["kind"] == "RayService"]
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > ServingConfig().request_timeout_s


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_secret_is_written_in_a_manifest(name: str) -> None:
    for container in containers(name):
        for variable in container["env"]:
            secret = re.search("TOKEN|KEY|PASSWORD|SECRET", variable["name"])
            assert not secret or "secretKeyRef" in variable["valueFrom"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_network_policy_and_disruption_budget_select_the_pods(name: str) -> None:
    labels = [template["metadata"]["labels"] for template in templates(name)]
    for other in [other for manifest in ("base", name) for other in objects(manifest)]:
        wanted = (other.get("spec") or {}).get("podSelector") or (other.get("spec") or {}).get("selector")
        if wanted:
            own = {key: value for key, value in wanted["matchLabels"].items() if not key.startswith("ray.io/")}
            assert own and all(own.items() <= found.items() for found in labels), other["kind"]


def room(name: str) -> list[dict[str, float]]:
    """What Ray sees on the worker pods when every group has grown to its limit."""
    nodes = []
    for group in cluster_spec(name)["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        nodes += [{"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}] * group["maxReplicas"]
    return nodes


def test_the_job_s_entrypoint_has_a_recipe_that_fits_on_its_nodes() -> None:
    program, command, recipe, *arguments = shlex.split(ray_object("rayjob")["spec"]["entrypoint"])
    assert (program, command) == ("spin-ray", "run")
    overrides = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
    config = load_config(ROOT / Path(recipe).relative_to("/app"), overrides)
    for stage, bundles in demands(config).items():
        assert placeable(bundles, room("rayjob")), f"{stage} does not fit on the worker pods"
    assert config.generation.resources.gpus == config.generation.engine.tensor_parallel_size
    assert config.cluster.address and config.cluster.wait_for_nodes_s > 0, "worker pods start after the driver"
    assert arguments[arguments.index("--out") + 1].startswith("/shared/"), "RUN must outlive the cluster"


def test_the_job_is_retried_on_a_head_that_the_submitter_shares() -> None:
    spec = ray_object("rayjob")["spec"]
    assert spec["submissionMode"] == "SidecarMode" and "submitterPodTemplate" not in spec
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"]


def test_the_service_imports_an_application_that_is_there() -> None:
    config = yaml.safe_load(ray_object("rayservice")["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, _, function = application["import_path"].partition(":")
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    assert re.search(rf"^def {function}\(|^{function} =", Path(spec.origin).read_text(), re.MULTILINE)
    ports = [port["containerPort"] for container in containers("rayservice") for port in container["ports"]]
    assert config["http_options"]["port"] in ports


def test_the_service_s_settings_exist_and_its_engines_fit() -> None:
    """Twice as many as are named: a swap starts the new engine before the old one goes."""
    (application,) = yaml.safe_load(ray_object("rayservice")["spec"]["serveConfigV2"])["applications"]
    settings = {key: json.dumps(value) for key, value in application["args"].items() if key != "run"}
    serving = override(load_config(ROOT / "jobs" / "recipes" / "zephyr_7b.yaml"), settings).serving
    assert placeable([serving.resources.bundle] * 2 * len(serving.models) * serving.replicas, room("rayservice"))
    mounts = [Path(mount["mountPath"]) for mount in containers("rayservice")[0]["volumeMounts"]]
    assert serving.keys is not None and Path(serving.keys).parent in mounts


def test_the_image_is_pinned_not_root_and_copies_what_exists() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.12\.\d+-slim-\w+$", "\n".join(lines), re.MULTILINE)
    user = [line for line in lines if line.startswith("USER ")][-1]
    uid = templates("rayjob")[0]["spec"]["securityContext"]["runAsUser"]
    assert user == f"USER {uid}:{uid}"
    copied = [part for line in lines if re.match(r"COPY (?!--from)", line) for part in line.split()[1:-1]]
    missing = [part for part in copied if not part.startswith("--") and not (ROOT / part).exists()]
    assert copied and not missing
