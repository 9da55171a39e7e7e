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
import yaml
from dockerfile_parse import DockerfileParser

from app.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
LONG_RUNNING = sorted(name for name, service in SERVICES.items() if service["restart"] != "no")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = Path(sys.executable).parent


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


def test_api_image_installs_the_pinned_serving_install_and_no_extra():
    installs = [run for stage in content("api") for run in stage.values("RUN") if "pip install" in run]
    assert len(installs) == 1
    assert "--constraint constraints.txt" in installs[0]
    assert "[" not in installs[0]
    assert "torch" not in installs[0]


def test_worker_image_adds_the_training_extra():
    installs = [run for stage in content("worker") for run in stage.values("RUN") if "pip install" in run]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in run for run in installs)
    assert any('".[train]"' in run for run in installs)


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


def test_only_the_api_is_published_and_only_on_loopback():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert list(published) == ["api"]
    assert all(port.startswith("127.0.0.1:") for port in published["api"])


def test_database_and_object_store_sit_on_a_network_without_a_way_out():
    assert COMPOSE["networks"]["backend"] == {"internal": True}
    assert SERVICES["postgres"]["networks"] == SERVICES["s3"]["networks"] == ["backend"]


def test_foreign_images_are_pinned_to_a_version():
    for name in ("postgres", "s3"):
        tag = SERVICES[name]["image"].partition(":")[2]
        assert re.fullmatch(r"\d+\.\d+(-\w+)?", tag), SERVICES[name]["image"]
    assert SERVICES["postgres"]["image"].startswith("postgres:17.")
    assert tuple(map(int, SERVICES["s3"]["image"].partition(":")[2].split("."))) >= (4, 42)


def test_our_image_carries_the_version_of_the_package():
    assert SERVICES["api"]["image"] == f"widthwise-api:{PYPROJECT['project']['version']}"


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
    if "build" in service:
        assert service["read_only"] is True
        assert "cap_add" not in service


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_secrets_come_from_outside_and_are_never_defaulted(name):
    for variable, value in SERVICES[name].get("environment", {}).items():
        secret = variable.endswith(("PASSWORD", "SECRET_ACCESS_KEY", "ACCESS_KEY_ID", "DATABASE_URL"))
        assert (":?" in value) == secret, f"{variable} of {name}"


def test_example_environment_names_every_variable_and_fills_in_no_secret():
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    example = dict(
        line.split("=", 1) for line in (ROOT / ".env.example").read_text().splitlines() if re.match(r"\w+=", line)
    )
    assert set(example) == used
    assert {name for name, value in example.items() if value} == {"PORT"}


def test_api_waits_for_a_migration_that_waits_for_database_and_object_store():
    assert SERVICES["api"]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
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
    mounted = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert mounted == set(COMPOSE["volumes"])


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
