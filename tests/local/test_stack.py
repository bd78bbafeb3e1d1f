import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg2
import pytest

import catalog
from local import servers, spawn, stack, supervisor
from settings import Settings

from .conftest import ROOT, Project, children

Until = Callable[[Callable[[], object]], None]


def kept_rows(project: Project) -> int:
    connection = psycopg2.connect(servers.urls(project.home)[0])
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM kept")
            row = cursor.fetchone()
            return int(row[0]) if row else 0
    finally:
        connection.close()


def test_up_status_down_and_up_again(project: Project) -> None:
    up = project.run("up")
    assert up.returncode == 0, up.stdout + up.stderr
    assert "✓ echo" in up.stdout
    assert f"curl http://127.0.0.1:{project.port}/v1/chat/completions" in up.stdout
    assert '-H "Authorization: Bearer sk-test"' in up.stdout

    again = project.run("up")
    assert again.returncode == 0
    assert "already up" in again.stdout
    assert "sk-test" not in again.stdout

    status = project.run("status").stdout
    for word in ("postgres", "valkey", "gateway0", "worker-echo0", "reconciler", "batcher", "flower", "ready", "queue"):
        assert word in status

    pids = [int(str(child["pid"])) for child in children(project.home).values() if child["pid"]]
    down = project.run("down")
    assert down.returncode == 0
    assert "Data and keys are kept" in down.stdout
    assert not any(spawn.start_ticks(pid) for pid in pids)
    assert "not running" in project.run("down").stdout
    assert "not running" in project.run("status").stdout

    assert project.run("up").returncode == 0
    assert kept_rows(project) == 2


def test_no_secret_is_on_a_command_line_or_in_an_open_file(running: Project) -> None:
    state = json.loads((running.home / "servers.json").read_text())
    flower = (running.home / "flower.credentials").read_text().strip()
    secrets = [state["postgres"]["password"], state["valkey"]["password"], flower]
    for child in children(running.home).values():
        if child["pid"]:
            line = " ".join(psutil.Process(int(str(child["pid"]))).cmdline())
            assert not any(secret in line for secret in secrets)
    for file in (file for file in running.home.rglob("*") if file.is_file() and "postgres" not in file.parts):
        if any(secret in file.read_text(errors="replace") for secret in secrets):
            assert file.stat().st_mode & 0o077 == 0, file


@pytest.mark.parametrize("name", ["worker-echo0", "gateway0", "valkey", "postgres"])
def test_what_is_killed_comes_back(running: Project, until: Until, name: str) -> None:
    """Postgres with its rows: `migrate` wrote one, once."""
    before = children(running.home)[name]
    os.kill(int(str(before["pid"])), signal.SIGKILL)
    until(lambda: int(str(children(running.home)[name]["restarts"])) > int(str(before["restarts"])))
    until(lambda: children(running.home)[name]["state"] == "running")
    assert children(running.home)[name]["last_exit"] == "SIGKILL"
    assert kept_rows(running) == 1


def test_up_after_the_supervisor_was_killed(project: Project, until: Until) -> None:
    assert project.run("up").returncode == 0
    pids = [int(str(child["pid"])) for child in children(project.home).values() if child["pid"]]
    os.kill(supervisor.read_state(project.home)["pid"], signal.SIGKILL)
    until(lambda: not any(spawn.start_ticks(pid) for pid in pids))
    again = project.run("up")
    assert again.returncode == 0, again.stdout
    assert "already up" not in again.stdout
    assert kept_rows(project) == 2


def test_a_taken_port_is_named_with_its_remedy(project: Project) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", project.port))
        taken.listen()
        up = project.run("up")
    assert up.returncode == 1
    assert len(up.stdout.strip().splitlines()) == 1
    assert f"in use by {psutil.Process().name()}, pid {os.getpid()}" in up.stdout
    assert f"make up SWITCHYARD_PORT={project.port + 1}" in up.stdout
    assert not supervisor.is_running(project.home)


def test_a_worker_that_keeps_dying_is_reported_with_its_log(project: Project) -> None:
    up = project.run("up", BROKEN_WORKER="1")
    assert up.returncode == 1
    assert "worker-echo0 keeps ending (exit 1)" in up.stdout
    assert "the model cannot be loaded" in up.stdout
    assert "make down" in up.stdout


def test_an_unusable_configuration_is_one_line(project: Project) -> None:
    (project.folder / "switchyard.yaml").write_text("backends: {}\nmodels: {x: {path: x, backends: [y]}}\n")
    up = project.run("up")
    assert up.returncode == 1
    assert up.stdout.strip() == "error: models.x.backends: no backend 'y'"


def test_logs_of_an_unknown_process_name_the_known_ones(running: Project) -> None:
    logs = running.run("logs", "nobody")
    assert logs.returncode == 1
    assert {"gateway0", "postgres", "worker-echo0"} <= set(logs.stdout.replace(",", "").split())


@pytest.fixture
def declared(tmp_path: Path) -> catalog.Catalog:
    """Two backends of no real model: `a` with three workers, `b` with none."""
    config = tmp_path / "switchyard.yaml"
    config.write_text(
        """
        backends: {a: {runtime: echo, workers: 3, concurrency: 7}, b: {runtime: echo, workers: 0}}
        models: {echo: {path: echo, backends: [a, b]}}
        """
    )
    return catalog.load(config, tmp_path)


def test_the_plan_has_a_process_for_each_worker_and_gateway(tmp_path: Path, declared: catalog.Catalog) -> None:
    config = Settings(home=tmp_path, gateway_processes=2)
    plan = {spec.name: spec for spec in stack.plan(config, declared, stack.Urls("postgresql://x", "redis://x"))}
    assert list(plan) == [
        "migrate", "gateway0", "gateway1", "worker-a0", "worker-a1", "worker-a2", "reconciler", "batcher", "flower",
    ]  # fmt: skip
    worker = plan["worker-a1"]
    assert " ".join(worker.argv[1:]) == (
        "-m celery -A tasks worker -P custom -c 7 -Q a -n a1@%h -E --without-gossip --without-mingle -l WARNING"
    )
    assert worker.env["SWITCHYARD_BACKEND"] == "a"
    assert worker.env["CELERY_CUSTOM_WORKER_POOL"] == "tasks.pool:TaskPool"
    assert plan["migrate"].once
    assert plan["gateway1"].argv[1:] == ["-m", "api.server", "--index", "1"]


def test_a_stop_outlasts_the_drain(tmp_path: Path, declared: catalog.Catalog) -> None:
    plan = stack.plan(Settings(home=tmp_path, drain_s=33), declared, stack.Urls("postgresql://x", "redis://x"))
    assert all(
        spec.stop_s > 33 for spec in plan if spec.name.startswith(("gateway", "worker", "reconciler", "batcher"))
    )


def test_own_servers_replace_the_embedded_ones(tmp_path: Path, declared: catalog.Catalog) -> None:
    config = Settings(home=tmp_path, database_url="postgresql://theirs", redis_url="redis://theirs")
    plan = stack.plan(config, declared, stack.Urls(config.database_url, config.redis_url))
    assert not any(spec.is_server for spec in plan)
    assert {spec.env["SWITCHYARD_DATABASE_URL"] for spec in plan} == {"postgresql://theirs"}


def test_local_imports_nothing_that_it_starts() -> None:
    """Its processes are started by name; a stack that imported them could not outlive their errors."""
    for file in (ROOT / "local").glob("*.py"):
        for package in ("api", "tasks", "backends", "db"):
            assert f"\nimport {package}" not in file.read_text()
            assert f"\nfrom {package}" not in file.read_text()
