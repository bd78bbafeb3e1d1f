"""What runs on one machine, and the commands for it: up, down, status, logs.

`plan` turns the catalog and the settings into the supervisor's list of processes; the rest starts
that list, waits for it, shows it and stops it. Everything lies under SWITCHYARD_HOME.
"""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

import catalog
import settings
from catalog import Catalog, CatalogError
from local import models, servers, spawn, supervisor
from local.models import ModelError
from local.servers import Postgres, ServersError, Valkey
from local.supervisor import Spec
from settings import Settings

WAIT_S = 600.0
"""Longest wait of `up` for the models: vLLM compiles for more than a minute on its first start."""

GIVE_UP_AFTER = 3
"""Restarts after which `up` reports a process instead of waiting for it."""

STOP_MARGIN_S = 10.0
VLLM_DELAY_S = 12.0
SMALL_MACHINE_CORES = 4
FLOWER_FILE = "flower.credentials"

_console = Console(highlight=False)


class StackError(Exception):
    """The stack cannot do what was asked; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Urls:
    """Where processes find Postgres and Redis."""

    database: str
    redis: str


def up(detach: bool = True) -> None:
    """Start everything, wait until every model answers, and print how to call it.

    Without `detach` it then shows the logs until it is interrupted, and stops everything.
    Where the stack is up already it says so and changes nothing.
    """
    config = settings.load()
    models.prepare(config.models_dir, models.named_in(config.config), _console.print)
    declared = _catalog(config)
    servers.make_home(config.home)
    try:
        with supervisor.locked(config.home / "up.lock"):
            _up(config, declared)
    except KeyboardInterrupt as error:
        raise StackError("interrupted; what was started goes on: `make status`, `make down`") from error
    except BlockingIOError as error:
        raise StackError("another `up` is at work here; wait for it") from error
    if not detach:
        _follow_until_interrupted(config)


def down() -> None:
    """Stop everything: running calls get SWITCHYARD_DRAIN_S to finish. Data and keys stay."""
    home = _home()
    if not supervisor.is_running(home):
        ended = supervisor.clear_leftovers(home)
        _console.print(f"Ended {ended} left-over processes." if ended else "Switchyard is not running.")
        return
    state = supervisor.read_state(home)
    if spawn.start_ticks(state["pid"]) != state["ticks"]:
        raise StackError(f"the supervisor of {home} is just starting; try again")
    os.kill(state["pid"], signal.SIGTERM)
    limit = settings.load().drain_s + STOP_MARGIN_S + 4 * servers.STOP_S
    deadline = time.monotonic() + limit
    with _console.status("stopping …") as line:
        while supervisor.is_running(home):
            left = [child["name"] for child in supervisor.read_state(home)["children"] if child["pid"]]
            line.update(f"stopping: {', '.join(left)}")
            if time.monotonic() > deadline:
                raise StackError(f"still running after {limit:g} s: {', '.join(left)}; see `make logs`")
            time.sleep(0.05)
    _console.print("Switchyard is down. Data and keys are kept.")


def status() -> None:
    """Print processes, models and queues."""
    config = settings.load()
    declared = _catalog(config)
    if not supervisor.is_running(config.home):
        _console.print("Switchyard is not running. Start it with `make up`.")
        return
    _console.print(_process_table(supervisor.read_state(config.home)))
    _console.print(_model_table(declared, _models(config)))
    _console.print(_queue_table(config, declared))


def logs(name: str | None = None, follow: bool = True) -> None:
    """Show the logs of one process, of every process whose name starts with `name`, or of all."""
    folder = _home() / "logs"
    files = sorted(folder.glob(f"{name or ''}*.log"))
    if not files:
        known = ", ".join(sorted(file.stem for file in folder.glob("*.log"))) or "none yet: run `make up`"
        raise StackError(f"no log starts with {name!r}; there are: {known}")
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run(["tail", "-n", "40", *(["-F"] if follow else []), *map(str, files)], check=False)


def plan(
    config: Settings, declared: Catalog, urls: Urls, postgres: Postgres | None = None, valkey: Valkey | None = None
) -> list[Spec]:
    """The processes of the stack in start order; the servers only where they are embedded."""
    home = config.home.absolute()
    stop_s = config.drain_s + STOP_MARGIN_S
    common = {
        "SWITCHYARD_HOME": str(home),
        "SWITCHYARD_DATABASE_URL": urls.database,
        "SWITCHYARD_REDIS_URL": urls.redis,
        "PROMETHEUS_MULTIPROC_DIR": str(home / "metrics"),
        "PYTHONUNBUFFERED": "1",
    }
    return [
        *_server_specs(postgres, valkey),
        Spec("migrate", _python("db.migrate"), common, once=True),
        *(
            Spec(f"gateway{i}", _python("api.server", "--index", str(i)), common, stop_s=stop_s)
            for i in range(config.gateway_processes)
        ),
        *_worker_specs(declared, common, stop_s, is_vllm=False),
        Spec("reconciler", _python("tasks.reconciler"), common, stop_s=stop_s),
        Spec("batcher", _python("api.batcher"), common, stop_s=stop_s),
        Spec("flower", _flower(config.flower_port), common | {"FLOWER_BASIC_AUTH": _flower_credentials(home)}),
        *_worker_specs(declared, common, stop_s, is_vllm=True),
    ]


def _worker_specs(declared: Catalog, common: Mapping[str, str], stop_s: float, *, is_vllm: bool) -> Iterator[Spec]:
    """The workers, vLLM's apart: it imports for 40 CPU seconds, and on a small machine everything that
    starts beside it takes twice as long to answer."""
    delay_s = VLLM_DELAY_S if is_vllm and (os.cpu_count() or 1) <= SMALL_MACHINE_CORES else 0.0
    for name, backend in declared.backends.items():
        if (backend.runtime == "vllm") is is_vllm:
            for i in range(backend.entry.workers):
                yield Spec(
                    f"worker-{name}{i}",
                    _worker(name, i, backend.entry.concurrency),
                    {**common, **_worker_env(name)},
                    stop_s=stop_s,
                    delay_s=delay_s,
                )


def _server_specs(postgres: Postgres | None, valkey: Valkey | None) -> Iterator[Spec]:
    if postgres:
        yield Spec(
            "postgres",
            postgres.argv,
            is_server=True,
            postgres_data=str(postgres.data),
            uid=postgres.account.uid,
            stop_signal=postgres.stop_signal,
            death_signal=postgres.stop_signal,
            stop_s=servers.STOP_S,
        )
    if valkey:
        yield Spec("valkey", valkey.argv, is_server=True, port=valkey.port, stop_signal=valkey.stop_signal)


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _worker(backend: str, index: int, concurrency: int) -> list[str]:
    name = f"{backend}{index}@%h"
    pool = ["-P", "custom", "-c", str(concurrency)]
    quiet = ["--without-gossip", "--without-mingle", "-l", "WARNING"]
    return [*_python("celery"), "-A", "tasks", "worker", *pool, "-Q", backend, "-n", name, "-E", *quiet]


def _worker_env(backend: str) -> dict[str, str]:
    return {"CELERY_CUSTOM_WORKER_POOL": "tasks.pool:TaskPool", "SWITCHYARD_BACKEND": backend}


def _flower(port: int) -> list[str]:
    # Its credentials travel in the environment: every user of the machine can read a command line.
    return [*_python("celery"), "-A", "tasks", "flower", "--address=127.0.0.1", f"--port={port}", "--read-only"]


def _flower_credentials(home: Path) -> str:
    """`user:password`, made once."""
    file = home / FLOWER_FILE
    if not file.exists():
        servers.write_private(file, f"switchyard:{secrets.token_urlsafe(18)}\n")
    return file.read_text().strip()


def _catalog(config: Settings) -> Catalog:
    try:
        return catalog.load(config.config, config.models_dir)
    except CatalogError as error:
        raise StackError(str(error)) from error


def _home() -> Path:
    return settings.load().home


def _up(config: Settings, declared: Catalog) -> None:
    if supervisor.is_running(config.home):
        _console.print("Switchyard is already up.")
        _summary(config, declared, key=None)
        return
    supervisor.clear_leftovers(config.home)
    _check_port(config.host, config.port, "SWITCHYARD_PORT")
    _check_port("127.0.0.1", config.flower_port, "SWITCHYARD_FLOWER_PORT")
    urls = _start(config, declared)
    try:
        _wait(config, declared)
    except StackError as error:
        raise StackError(f"{error}\nThe rest keeps running: `make status`, `make logs`, `make down`.") from error
    _summary(config, declared, _new_key(urls))


def _start(config: Settings, declared: Catalog) -> Urls:
    """Prepare the embedded servers and hand the plan to a new supervisor."""
    home = config.home
    try:
        postgres = None if config.database_url else servers.prepare_postgres(home, say=_console.print)
        valkey = None if config.redis_url else servers.prepare_valkey(home)
    except ServersError as error:
        raise StackError(str(error)) from error
    urls = Urls(postgres.url if postgres else config.database_url, valkey.url if valkey else config.redis_url)
    shutil.rmtree(home / "metrics", ignore_errors=True)
    (home / "metrics").mkdir()
    supervisor.write_plan(home, plan(config, declared, urls, postgres, valkey))
    log = supervisor.log_file(home, "supervisor")
    supervisor.rotate(log)
    process = spawn.spawn_detached([*_python("local.supervisor"), str(home.absolute())], log)
    while supervisor.read_state(home).get("pid") != process.pid:
        if process.poll() is not None:
            raise StackError(f"the supervisor ended at once:\n{_tail(log)}")
        time.sleep(0.02)
    return urls


def _wait(config: Settings, declared: Catalog) -> None:
    """Return when every model that has a worker answers; show each as it becomes ready."""
    wanted = [name for name, model in declared.models.items() if any(b.entry.workers for b in declared.serving(model))]
    began = time.monotonic()
    ready: set[str] = set()
    with _console.status("starting …") as line:
        while len(ready) < len(wanted):
            states = _models(config)
            for name in wanted:
                if states.get(name) == "ready" and name not in ready:
                    ready.add(name)
                    _console.print(f"  [green]✓[/] {name} [dim]{time.monotonic() - began:.1f} s[/]")
            waiting = [name for name in wanted if name not in ready]
            line.update(f"waiting for {', '.join(waiting) if states else 'the gateway'} …")
            _check_health(config.home)
            if time.monotonic() - began > WAIT_S:
                raise StackError(f"not ready after {WAIT_S:g} s: {', '.join(waiting)}")
            if waiting:
                time.sleep(0.1)


def _check_health(home: Path) -> None:
    """Raise with the end of its log when a process keeps dying, or when the supervisor is gone."""
    if not supervisor.is_running(home):
        raise StackError(f"the supervisor ended:\n{_tail(supervisor.log_file(home, 'supervisor'))}")
    for child in supervisor.read_state(home)["children"]:
        if child["restarts"] >= GIVE_UP_AFTER and child["state"] != "running":
            tail = _tail(supervisor.log_file(home, child["name"]))
            raise StackError(f"{child['name']} keeps ending ({child['last_exit']}). The end of its log:\n{tail}")


def _models(config: Settings) -> dict[str, str]:
    """The gateway's view of each model; empty while it does not answer."""
    connection = http.client.HTTPConnection(_reachable(config.host), config.port, timeout=5.0)
    try:
        connection.request("GET", "/readyz")
        found: dict[str, str] = json.loads(connection.getresponse().read())["models"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return {}
    else:
        return found
    finally:
        connection.close()


def _reachable(host: str) -> str:
    """An address to call where `host` may be the one that means all of them."""
    return "127.0.0.1" if host in {"0.0.0.0", "::", ""} else host  # noqa: S104


def _new_key(urls: Urls) -> str:
    """A fresh API key; the one of the last `up` stops working."""
    # What the installed command `switchyard` does.
    command = [sys.executable, "-c", "from api.cli import main; main()", "keys", "create", "--name", "quickstart"]
    env = {"SWITCHYARD_DATABASE_URL": urls.database, "SWITCHYARD_REDIS_URL": urls.redis}
    made = subprocess.run(
        [*command, "--replace", "--json"], env=os.environ | env, capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        raise StackError(f"no API key could be made: {made.stderr.strip()[-800:]}")
    return str(json.loads(made.stdout)["key"])


def _summary(config: Settings, declared: Catalog, key: str | None) -> None:
    base = f"http://{_reachable(config.host)}:{config.port}"
    rows = {
        "API": f"{base}/v1",
        "Docs": f"{base}/docs",
        "Metrics": f"{base}/metrics",
        "Flower": f"http://127.0.0.1:{config.flower_port}  (login: {config.home / FLOWER_FILE})",
        "Logs": f"{config.home / 'logs'}  (make logs)",
        "API key": key or "shown when it was made; another one: .venv/bin/switchyard keys create --name NAME",
    }
    _console.print()
    for name, value in rows.items():
        _console.print(f"  {name:<9}{value}", soft_wrap=True, markup=False)
    if key:
        _console.print(f"\nTry it:\n\n{_curl(base, _first_model(declared), key)}\n", soft_wrap=True, markup=False)


def _curl(base: str, model: str, key: str) -> str:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    # Temperature 0: a model of this size needs it to stay with the question.
    body = json.dumps({"model": model, "messages": question, "temperature": 0})
    return (
        f"  curl {base}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-H \"Authorization: Bearer {key}\" \\\n    -d '{body}'"
    )


def _first_model(declared: Catalog) -> str:
    """The model of the example: the first real generator, else whatever generates."""
    generators = [name for name, model in declared.models.items() if "generate" in model.tasks]
    real = [name for name in generators if declared.models[name].entry.auto]
    return next(iter([*real, *generators, *declared.models]))


def _check_port(host: str, port: int, variable: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            remedy = f"stop it, or choose another port: make up {variable}={port + 1}"
            raise StackError(f"{host}:{port} cannot be used ({_holder(port) or error.strerror}): {remedy}") from error


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            here = connection.laddr
            if connection.status == psutil.CONN_LISTEN and here and here.port == port and connection.pid:
                return f"in use by {psutil.Process(connection.pid).name()}, pid {connection.pid}"
    return ""


def _tail(log: Path, lines: int = 25) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return "(no log)"


def _follow_until_interrupted(config: Settings) -> None:
    """For a service manager: stay in the foreground, end when interrupted or when the supervisor does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    files = map(str, sorted((config.home / "logs").glob("*.log")))
    tail = subprocess.Popen(["tail", "-n", "0", "-F", *files])
    try:
        with contextlib.suppress(KeyboardInterrupt):
            while supervisor.is_running(config.home):
                time.sleep(0.5)
    finally:
        tail.kill()
        tail.wait()
        down()


def _process_table(state: Mapping[str, Any]) -> Table:
    table = Table("process", "pid", "state", "restarts", "uptime", "memory", "last exit", box=None, pad_edge=False)
    for child in state["children"]:
        is_alive = bool(child["pid"])
        table.add_row(
            child["name"],
            str(child["pid"] or "–"),
            child["state"],
            str(child["restarts"]),
            _span(time.time() - child["since"]) if is_alive else "–",
            f"{_memory(child['pid']) / 2**20:,.0f} MB" if is_alive else "–",
            child["last_exit"] or "–",
        )
    return table


def _memory(leader: int) -> int:
    """Resident bytes of a process and everything below it."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(leader)
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += member.memory_info().rss
    return total


def _model_table(declared: Catalog, states: Mapping[str, str]) -> Table:
    table = Table("model", "state", "tasks", "backends", box=None, pad_edge=False)
    for name, model in declared.models.items():
        table.add_row(name, states.get(name, "down"), ", ".join(model.tasks), ", ".join(model.entry.backends))
    return table


def _queue_table(config: Settings, declared: Catalog) -> Table:
    """Messages that wait in Redis, which are hints: the jobs themselves are counted by `switchyard jobs`."""
    import redis

    import celeryconfig

    table = Table("queue", "messages", box=None, pad_edge=False)
    url = config.redis_url or servers.urls(config.home)[1]
    steps = celeryconfig.broker_transport_options["priority_steps"]
    with redis.Redis.from_url(url, socket_timeout=2.0) as client:
        for name in declared.backends:
            try:
                lengths = [client.llen(key) for key in (name, *(f"{name}\x06\x16{step}" for step in steps[1:]))]
                table.add_row(name, str(sum(lengths)))
            except redis.RedisError:
                table.add_row(name, "unknown")
    return table


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def main() -> None:
    """`python -m local.stack up | down | status | logs [NAME]`."""
    command, *rest = sys.argv[1:] or ["status"]
    try:
        match command:
            case "up":
                up(detach="--foreground" not in rest)
            case "down":
                down()
            case "status":
                status()
            case "logs":
                logs(rest[0] if rest else None)
            case _:
                raise StackError(f"no command {command!r}: up, down, status or logs")
    except (StackError, ServersError, ModelError) as error:
        _console.print("[red]error:[/] ", end="")
        _console.print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
