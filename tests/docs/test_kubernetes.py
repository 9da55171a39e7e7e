"""The Kubernetes manifests fit Kubernetes' own schemas and obey the rules of the house. No cluster is asked."""

import re
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from app.cli import SHUTDOWN_TIMEOUT_S, cli
from app.settings import Settings
from app.worker.main import LAST_WORDS_S

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy" / "kubernetes" / "base"
KUSTOMIZATION = yaml.safe_load((BASE / "kustomization.yaml").read_text())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMMANDS = set(typer.main.get_command(cli).commands)  # type: ignore[attr-defined]
SETTINGS = {f"WIDTHWISE_{name.upper()}" for name in Settings.model_fields}
OLDEST = "1.34.0"  # the oldest Kubernetes that is looked at; `sleep` before the stop is stable since then
Manifest = dict[str, Any]


def documents(name: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all((BASE / name).read_text()) if document]


MANIFESTS = [document for name in KUSTOMIZATION["resources"] for document in documents(name)]
EXAMPLES = documents("secret.example.yaml")
WORKLOADS = [one for one in MANIFESTS if one["kind"] in ("Deployment", "Job")]


def called(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def the(kind: str, name: str) -> Manifest:
    (found,) = [one for one in MANIFESTS if called(one) == f"{kind}/{name}"]
    return found


def pod_of(workload: Manifest) -> Manifest:
    pod: Manifest = workload["spec"]["template"]["spec"]
    return pod


def container_of(workload: Manifest) -> Manifest:
    (container,) = pod_of(workload)["containers"]
    found: Manifest = container
    return found


each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=called)


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("manifest", MANIFESTS + EXAMPLES, ids=called)
def test_manifests_fit_the_schemas_of_kubernetes(manifest: Manifest, version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schema_check_can_fail() -> None:
    broken = yaml.safe_load(yaml.safe_dump(the("Deployment", "widthwise-api")))
    broken["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, OLDEST, strict=True)


def test_the_kustomization_names_every_file_but_the_example() -> None:
    files = {path.name for path in BASE.glob("*.yaml")}
    assert files - {"kustomization.yaml", "secret.example.yaml"} == set(KUSTOMIZATION["resources"])


def test_everything_lies_in_one_namespace_that_lets_only_restricted_pods_in() -> None:
    namespace = the("Namespace", "widthwise")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {one["metadata"]["namespace"] for one in MANIFESTS + EXAMPLES if one["kind"] != "Namespace"} == {"widthwise"}


@each_workload
def test_pods_are_restricted(workload: Manifest) -> None:
    pod, container = pod_of(workload), container_of(workload)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001  # as in the Dockerfile
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all("hostPath" not in volume for volume in pod["volumes"])


@each_workload
def test_no_service_link_can_pass_for_a_setting(workload: Manifest) -> None:
    """A Service named `widthwise` would otherwise set WIDTHWISE_PORT=tcp://… in every pod."""
    assert pod_of(workload)["enableServiceLinks"] is False


@each_workload
def test_resources_and_scratch_are_bounded(workload: Manifest) -> None:
    resources = container_of(workload)["resources"]
    assert {"cpu", "memory"} <= resources["requests"].keys()
    assert {"cpu", "memory"} <= resources["limits"].keys()
    volumes = {volume["name"]: volume for volume in pod_of(workload)["volumes"]}
    assert all("sizeLimit" in volume["emptyDir"] for volume in volumes.values())
    mounts = {mount["mountPath"] for mount in container_of(workload)["volumeMounts"]}
    assert {"/scratch", "/tmp"} <= mounts


def test_an_api_pod_has_room_for_the_uploads_it_puts_together() -> None:
    """They are spooled before they are sent to the store; a pod that takes more scratch than its limit is evicted."""
    (scratch,) = [one for one in pod_of(the("Deployment", "widthwise-api"))["volumes"] if one["name"] == "scratch"]
    amount, unit = re.fullmatch(r"(\d+)(Gi)", scratch["emptyDir"]["sizeLimit"]).groups()  # type: ignore[union-attr]
    assert unit == "Gi"
    assert int(amount) * 1024**3 >= 2 * Settings.model_fields["max_upload_bytes"].default


def test_a_worker_has_memory_for_the_checks_it_runs() -> None:
    limits = container_of(the("Deployment", "widthwise-worker"))["resources"]["limits"]
    memory = int(limits["memory"].removesuffix("Gi")) * 1024**3
    assert memory > Settings.model_fields["teacher_check_memory_bytes"].default


@each_workload
def test_images_are_ours_and_carry_the_version_of_the_package(workload: Manifest) -> None:
    name, _, tag = container_of(workload)["image"].partition(":")
    assert tag == VERSION
    assert {"name": name, "newTag": VERSION} in KUSTOMIZATION["images"]


def test_a_migration_of_another_version_is_another_job() -> None:
    (job,) = [one for one in MANIFESTS if one["kind"] == "Job"]
    assert job["metadata"]["name"] == f"widthwise-migrate-{VERSION.replace('.', '-')}"
    assert container_of(job)["command"] == ["widthwise", "migrate"]


@each_workload
def test_commands_that_are_run_exist(workload: Manifest) -> None:
    container = container_of(workload)
    probes = [container.get(f"{kind}Probe", {}) for kind in ("startup", "liveness", "readiness")]
    commands = [container.get("command", []), *(probe.get("exec", {}).get("command", []) for probe in probes)]
    assert {command[1] for command in commands if command} <= COMMANDS


def test_the_api_is_probed_at_its_own_paths() -> None:
    container = container_of(the("Deployment", "widthwise-api"))
    paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health/live", "liveness": "/health/live", "readiness": "/health/ready"}
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]


def test_pods_are_given_time_to_end() -> None:
    api = pod_of(the("Deployment", "widthwise-api"))
    sleep = api["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert api["terminationGracePeriodSeconds"] > sleep + SHUTDOWN_TIMEOUT_S
    worker = pod_of(the("Deployment", "widthwise-worker"))
    assert worker["terminationGracePeriodSeconds"] > Settings.model_fields["child_grace_s"].default + LAST_WORDS_S


def test_the_autoscaler_owns_the_number_of_api_pods() -> None:
    scaler = the("HorizontalPodAutoscaler", "widthwise-api")["spec"]
    assert scaler["scaleTargetRef"]["name"] == "widthwise-api"
    assert scaler["minReplicas"] >= 2
    assert [metric["resource"]["name"] for metric in scaler["metrics"]] == ["cpu"]
    assert "replicas" not in the("Deployment", "widthwise-api")["spec"]


@pytest.mark.parametrize("name", ["widthwise-api", "widthwise-worker"])
def test_selectors_find_the_pods(name: str) -> None:
    labels = the("Deployment", name)["spec"]["template"]["metadata"]["labels"]
    assert the("Deployment", name)["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert the("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"].items() <= labels.items()
    if name == "widthwise-api":
        service = the("Service", name)["spec"]
        assert service["selector"].items() <= labels.items()
        assert service.get("type", "ClusterIP") == "ClusterIP", "an ingress publishes it, not the Service"


def test_whatever_is_not_allowed_is_denied() -> None:
    everything = the("NetworkPolicy", "default-deny")["spec"]
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_workers_reach_database_object_store_and_names_alone() -> None:
    policies = [one["spec"] for one in MANIFESTS if one["kind"] == "NetworkPolicy"]
    egress = [rule for spec in policies if "Egress" in spec["policyTypes"] for rule in spec.get("egress", [])]
    ports = {port["port"] for rule in egress for port in rule["ports"]}
    assert ports == {5432, 8333, 53}
    assert all(rule["to"] for rule in egress), "an empty `to` is everywhere"
    worker = [one for one in policies if "ingress" in one and "widthwise-worker" in str(one["podSelector"])]
    assert [port["port"] for one in worker for rule in one["ingress"] for port in rule["ports"]] == [9100]


def test_policies_name_labels_that_pods_have() -> None:
    pods = {one["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"] for one in WORKLOADS}
    (expression,) = the("NetworkPolicy", "backends")["spec"]["podSelector"]["matchExpressions"]
    assert set(expression["values"]) == pods


def test_settings_exist_and_no_secret_is_committed() -> None:
    config = the("ConfigMap", "widthwise")["data"]
    named = set(config) | {name for one in EXAMPLES for name in one["stringData"]}
    assert {name for name in named if name.startswith("WIDTHWISE_")} <= SETTINGS
    assert config["WIDTHWISE_AUTH"] == "keys"
    assert not any(re.search(r"PASSWORD|SECRET|KEY|DATABASE_URL", name) for name in config)
    assert not any(value for one in EXAMPLES for value in one["stringData"].values())
    assert not any(one["kind"] == "Secret" for one in MANIFESTS)


def test_the_admin_key_is_the_apis_alone() -> None:
    for workload in WORKLOADS:
        secrets = {source["secretRef"]["name"] for source in container_of(workload)["envFrom"] if "secretRef" in source}
        assert ("widthwise-admin" in secrets) == (called(workload) == "Deployment/widthwise-api")
