"""Dockerfile, compose file and package metadata obey the rules of the house.

There is no container engine in the test run: the files are parsed and linted, and every rule that keeps a deployment
safe is asserted on what was parsed.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from dockerfile_parse import DockerfileParser

from app.cli import SHUTDOWN_TIMEOUT_S, cli
from app.settings import Settings
from app.worker.main import LAST_WORDS_S

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
LONG_RUNNING = sorted(name for name, service in SERVICES.items() if service["restart"] != "no")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = Path(sys.executable).parent
COMMANDS = set(typer.main.get_command(cli).commands)  # type: ignore[attr-defined]


class Stage:
    """A stage of the Dockerfile: its name, what it starts from, its instructions."""

    def __init__(self, image: str, name: str) -> None:
        self.image, self.name = image, name
        self.instructions: list[tuple[str, str]] = []

    def values(self, instruction: str) -> list[str]:
        return [value for name, value in self.instructions if name == instruction]


def read_stages() -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    stage = None
    with (ROOT / "Dockerfile").open("rb") as file:
        for line in DockerfileParser(fileobj=file).structure:
            if line["instruction"] == "FROM":
                image, name = re.split(r"\s+AS\s+", line["value"])
                stage = stages[name] = Stage(image, name)
            elif stage is not None and line["instruction"] != "COMMENT":
                stage.instructions.append((line["instruction"], line["value"]))
    return stages


STAGES = read_stages()


def lineage(name: str) -> list[Stage]:
    """A stage and all it starts from, oldest first."""
    stage = STAGES[name]
    return [*(lineage(stage.image) if stage.image in STAGES else []), stage]


def content(name: str) -> list[Stage]:
    """Every stage that leaves something in the image of `name`: its lineage and what is copied from other stages."""
    own = lineage(name)
    copied = [match for stage in own for value in stage.values("COPY") for match in re.findall(r"--from=(\S+)", value)]
    return own + [stage for source in copied for stage in lineage(source)]


# --- Dockerfile ---


def test_dockerfile_passes_its_linter():
    subprocess.run([SCRIPTS / "hadolint", ROOT / "Dockerfile"], check=True)


def test_base_image_is_pinned_to_a_patch_version():
    outside = {stage.image for stage in STAGES.values() if stage.image not in STAGES}
    assert len(outside) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", outside.pop())


def test_api_image_is_what_a_build_without_a_target_makes():
    assert list(STAGES)[-1] == "api"


def test_api_image_installs_the_pinned_serving_install_and_no_extra_but_that_for_traces():
    installs = [run for stage in content("api") for run in stage.values("RUN") if "pip install" in run]
    assert len(installs) == 1
    assert "--constraint constraints.txt" in installs[0]
    assert re.findall(r"\[[^]]*]", installs[0]) == ["[otel]"]
    assert "torch" not in installs[0]


def test_worker_image_adds_the_training_extra():
    installs = [run for stage in content("worker") for run in stage.values("RUN") if "pip install" in run]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in run for run in installs)
    assert any('".[otel,train]"' in run for run in installs)


def test_worker_image_works_and_is_probed_for_signs_of_life():
    (command,) = STAGES["worker"].values("CMD")
    assert json.loads(command) == ["widthwise", "worker"]
    (probe,) = STAGES["worker"].values("HEALTHCHECK")
    assert json.loads(probe[probe.index("CMD") + 3 :]) == ["widthwise", "worker-health"]


@pytest.mark.parametrize("target", ["api", "worker"])
def test_what_commands_the_images_run_exist(target):
    commands = [*STAGES[target].values("CMD"), *STAGES[target].values("HEALTHCHECK")]
    named = {name for command in commands for name in re.findall(r'"widthwise", "([a-z-]+)"', command)}
    assert named <= COMMANDS


def test_what_may_be_lost_lies_in_a_volume_that_the_user_owns():
    runtime = STAGES["runtime"]
    assert any('"/scratch"' in volume for volume in runtime.values("VOLUME"))
    assert any(
        "install --directory --owner=widthwise --group=widthwise /scratch" in run for run in runtime.values("RUN")
    )
    (environment,) = runtime.values("ENV")
    assert "TMPDIR=/scratch" in environment
    assert "WIDTHWISE_WORK_DIR=/scratch/jobs" in environment


def test_no_image_opens_the_service_without_keys():
    for stage in STAGES.values():
        assert not any("ALLOW_OPEN_BIND" in value or "WIDTHWISE_AUTH=open" in value for value in stage.values("ENV"))


@pytest.mark.parametrize("target", ["api", "worker"])
def test_images_run_as_a_numbered_user_that_is_not_root(target):
    users = [user for stage in lineage(target) for user in stage.values("USER")]
    assert users == ["10001:10001"]


@pytest.mark.parametrize("target", ["api", "worker"])
def test_images_hold_no_compiler_or_source_tree(target):
    for stage in lineage(target):
        assert all("--from=" in value for value in stage.values("COPY"))
        assert not any("apt-get" in run for run in stage.values("RUN"))


def test_api_image_is_probed_at_its_liveness_path_without_curl():
    (probe,) = STAGES["api"].values("HEALTHCHECK")
    assert "http://127.0.0.1:8000/health/live" in probe
    command = json.loads(probe[probe.index("CMD") + 3 :])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")


def test_environment_of_the_images_is_made_of_settings_that_exist():
    for stage in STAGES.values():
        for names in stage.values("ENV"):
            assert set(re.findall(r"\bWIDTHWISE_\w+", names)) <= setting_names()


def test_build_context_leaves_secrets_and_data_out():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = {path for value in STAGES["build-api"].values("COPY") for path in value.split()[:-1]}
    assert copied == {rule[1:] for rule in rules if rule.startswith("!")}


# --- compose ---


def setting_names() -> set[str]:
    return {f"WIDTHWISE_{name.upper()}" for name in Settings.model_fields}


def test_compose_file_follows_the_compose_specification():
    command = [SCRIPTS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"]
    subprocess.run(command, check=True)


def test_only_the_proxy_is_published_and_by_default_only_on_loopback():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"proxy": ["${BIND:-127.0.0.1}:${PORT:-8000}:8080"]}
    assert not any("network_mode" in service or service.get("privileged") for service in SERVICES.values())


def test_the_service_asks_everybody_for_a_key():
    assert SERVICES["api"]["environment"]["WIDTHWISE_AUTH"] == "keys"
    assert "WIDTHWISE_ADMIN_KEY" not in SERVICES["worker"]["environment"], "no worker needs it"
    text = (ROOT / "docker-compose.yml").read_text()
    assert "ALLOW_OPEN_BIND" not in text


def test_two_servers_and_two_workers_stand_behind_the_proxy():
    assert SERVICES["api"]["deploy"]["replicas"] == SERVICES["worker"]["deploy"]["replicas"] == 2
    assert SERVICES["proxy"]["depends_on"] == {"api": {"condition": "service_healthy"}}
    assert SERVICES["proxy"]["networks"] == ["front"]
    assert SERVICES["worker"]["networks"] == ["backend"], "a worker has no way out"


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_container_has_limits(name):
    limits = SERVICES[name]["deploy"]["resources"]["limits"]
    assert {"cpus", "memory", "pids"} <= limits.keys()


def test_a_worker_has_memory_for_the_checks_it_runs():
    memory = re.search(r"WORKER_MEMORY:-(\d+)G", SERVICES["worker"]["deploy"]["resources"]["limits"]["memory"])
    assert memory is not None
    assert int(memory[1]) * 1024**3 > Settings.model_fields["teacher_check_memory_bytes"].default


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_every_service_that_stays_is_given_time_to_end(name):
    seconds = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    assert seconds > SHUTDOWN_TIMEOUT_S
    if name == "worker":
        assert seconds > Settings.model_fields["child_grace_s"].default + LAST_WORDS_S


def test_database_and_object_store_sit_on_a_network_without_a_way_out():
    assert COMPOSE["networks"]["backend"] == {"internal": True}
    for name in ("postgres", "s3", "worker", "migrate"):
        assert SERVICES[name]["networks"] == ["backend"]


def test_foreign_images_are_pinned_to_a_version():
    for name in ("postgres", "s3", "proxy"):
        tag = SERVICES[name]["image"].partition(":")[2]
        assert re.fullmatch(r"\d+\.\d+(\.\d+)?(-\w+)?", tag), SERVICES[name]["image"]
    assert SERVICES["postgres"]["image"].startswith("postgres:17.")
    assert tuple(map(int, SERVICES["s3"]["image"].partition(":")[2].split("."))) >= (4, 42)


def test_our_images_carry_the_version_of_the_package():
    for name in ("api", "worker"):
        assert SERVICES[name]["image"] == f"widthwise-{name}:{PYPROJECT['project']['version']}"
        assert SERVICES[name]["build"]["target"] == name
    assert SERVICES["migrate"]["image"] == SERVICES["api"]["image"]


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_every_service_that_stays_has_a_health_check(name):
    service = SERVICES[name]
    if "build" in service:
        assert STAGES[service["build"]["target"]].values("HEALTHCHECK")[0] != "NONE"
    else:
        assert service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_containers_start_with_no_privileges_to_spare(name):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if name not in ("postgres", "s3"):
        assert service["read_only"] is True
        assert "cap_add" not in service


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_secrets_come_from_outside_and_are_never_defaulted(name):
    for variable, value in SERVICES[name].get("environment", {}).items():
        secret = variable.endswith(("PASSWORD", "SECRET_ACCESS_KEY", "ACCESS_KEY_ID", "DATABASE_URL", "ADMIN_KEY"))
        assert (":?" in value) == secret, f"{variable} of {name}"


def test_example_environment_names_every_variable_and_fills_in_no_secret():
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    example = dict(
        line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if re.match(r"\w+=", line)
    )
    assert set(example) == used
    filled_in = {name for name, value in example.items() if value}
    assert filled_in == {"BIND", "PORT", "WORKER_CPUS", "WORKER_MEMORY"}
    assert example["BIND"] == "127.0.0.1"


def test_api_and_workers_wait_for_a_migration_that_waits_for_database_and_object_store():
    for name in ("api", "worker"):
        assert SERVICES[name]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
    assert SERVICES["migrate"]["depends_on"] == {
        "postgres": {"condition": "service_healthy"},
        "s3": {"condition": "service_healthy"},
    }
    assert SERVICES["migrate"]["command"] == ["widthwise", "migrate"]


def test_settings_of_the_compose_file_exist():
    for service in SERVICES.values():
        names = {name for name in service.get("environment", {}) if name.startswith("WIDTHWISE_")}
        assert names <= setting_names()


def test_volumes_are_named_so_that_data_survives_the_containers():
    mounted = {volume for service in SERVICES.values() for volume in service.get("volumes", [])}
    named = {volume.split(":")[0] for volume in mounted if not volume.startswith((".", "/"))}
    assert named == set(COMPOSE["volumes"])
    assert {volume for volume in mounted if volume.startswith("/")} == {"/scratch"}, (
        "each container's own, and may be lost"
    )
    assert all(volume.endswith(":ro") for volume in mounted if volume.startswith("."))


# --- package ---


def test_every_dependency_is_pinned():
    pinned = {
        re.sub(r"[-_.]+", "-", line.split("==")[0].lower())
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    project = PYPROJECT["project"]
    required = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.match(r"[\w.-]+", requirement).group().lower() for requirement in required} - {"widthwise"}  # type: ignore[union-attr]
    assert names <= pinned


def test_torch_is_pinned_exactly_and_only_the_training_extra_asks_for_it():
    project = PYPROJECT["project"]
    assert not any("torch" in requirement for requirement in project["dependencies"])
    extras = project["optional-dependencies"]
    asking = {extra for extra, names in extras.items() if any(re.match(r"torch\b(?!-)", name) for name in names)}
    assert asking == {"train"}
    (requirement,) = [name for name in extras["train"] if name.startswith("torch")]
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", requirement)
    assert requirement in (ROOT / "constraints.txt").read_text().splitlines()


def test_migrations_folder_does_not_hide_the_library_of_its_name():
    assert not (ROOT / "alembic" / "__init__.py").exists()
