"""The command files say what the code does."""

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from local import servers, stack
from settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
BACKENDS: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "switchyard.yaml").read_text())["backends"]
OWN = sorted(name for name in SERVICES if "build" in SERVICES[name])


def test_make_help_lists_every_target() -> None:
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"make ([a-z-]+)", shown)) >= set(declared[1].split())


def test_every_target_is_declared() -> None:
    text = (ROOT / "Makefile").read_text()
    declared = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert declared
    assert set(re.findall(r"^([a-z-]+):", text, re.MULTILINE)) == set(declared[1].split())


def test_a_service_for_every_backend() -> None:
    assert {name for name in SERVICES if name.startswith("worker-")} == {f"worker-{name}" for name in BACKENDS}


@pytest.mark.parametrize("name", BACKENDS)
def test_a_worker_service_runs_what_the_one_machine_stack_runs(name: str) -> None:
    service = SERVICES[f"worker-{name}"]
    ours = stack._worker(name, 0, BACKENDS[name].get("concurrency", 32))[2:]
    assert service["command"].split() == [part.replace(f"{name}0@", f"{name}@") for part in ours]
    assert service["environment"].items() >= stack._worker_env(name).items()


def test_only_vllm_needs_a_gpu() -> None:
    assert [name for name in SERVICES if "profiles" in SERVICES[name]] == ["worker-vllm"]


def test_ports_are_bound_to_loopback() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", OWN)
def test_own_services_are_confined_and_drain(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["init"]
    assert float(service["stop_grace_period"].rstrip("s")) >= Settings().drain_s + stack.STOP_MARGIN_S


def test_passwords_must_be_given() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "FLOWER_BASIC_AUTH"):
        uses = re.findall(r"\$\{" + name + r"[^}]*\}", text)
        assert uses
        assert all(":?" in use for use in uses)
        assert f"#{name}=" in (ROOT / ".env.example").read_text()


def test_both_stacks_run_the_same_postgres() -> None:
    assert SERVICES["postgres"]["image"] == f"postgres:{servers.POSTGRES_MAJOR}"


def test_settings_in_the_example_exist() -> None:
    named = re.findall(r"^#SWITCHYARD_(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert named
    assert {name.lower() for name in named} <= set(Settings.model_fields)


def test_no_secret_goes_into_an_image() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".env", ".switchyard", ".git", "models"} <= set(ignored)


def test_continuous_integration_runs_the_makefile() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make check test" in script.read_text()


@pytest.mark.parametrize("name", ["settings", "catalog", "celeryconfig"])
def test_the_modules_everybody_reads_import_no_package_of_ours(name: str) -> None:
    """The rest of the import rules is import-linter's, which knows packages only."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module.split(".")[0] for module in imported} & {"api", "tasks", "backends", "db", "local"}
