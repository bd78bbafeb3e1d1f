"""A private Switchyard for one measurement: throwaway servers, and the processes that `make up` starts.

The commands come from `local.stack.plan`, so what is measured is what runs. Every process leads its own
session and dies with this one; nothing is left behind.
"""

import contextlib
import functools
import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import catalog
from db import api_keys, session
from db.session import Cursor
from db.tenants import NO_LIMITS, Limits
from local import servers, spawn, stack
from settings import Settings

ROOT = Path(__file__).parents[1]
READY_S = 300.0
STOP_S = 40.0
_ASKED_TIMES = 12
"""For each gateway that shares a port: that one of them is never asked is out of the question."""

ECHO = """\
backends:
  echo: {runtime: echo, concurrency: 256}
models:
  echo: {path: echo, backends: [echo]}
"""


class StackError(Exception):
    """The stack did not come up; the message has the end of the log."""


@dataclass(slots=True)
class Stack:
    """A running stack."""

    port: int
    key: str
    home: Path
    database_url: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    spawns: dict[str, Callable[[], subprocess.Popen[bytes]]] = field(default_factory=dict)

    def restart(self, name: str) -> None:
        """Start a process that has ended again, as the supervisor would."""
        self.processes[name] = self.spawns[name]()

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def create_key(self, tenant: str, limits: Limits = NO_LIMITS) -> str:
        """The secret of a new API key."""
        return _key(self.database_url, tenant, limits)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far, by process name."""
        return {name: cpu_s(process.pid) for name, process in self.processes.items()}


@contextlib.contextmanager
def running(
    config: str, *, durable: bool = True, gateways: int = 1, env: Mapping[str, str] | None = None
) -> Iterator[Stack]:
    """A stack that serves `config` (the text of a switchyard.yaml), every model ready.

    `durable=False` turns Postgres's fsync off; `gateways` processes share the port; `env` is added to every process's
    environment.
    """
    home = Path(tempfile.mkdtemp(prefix="switchyard-bench-"))
    with contextlib.ExitStack() as exits:
        exits.callback(shutil.rmtree, home, ignore_errors=True)
        postgres, valkey = exits.enter_context(servers.throwaway(durable=durable))
        file = home / "switchyard.yaml"
        file.write_text(config)
        settings = Settings(
            config=file, home=home, models_dir=ROOT / "models", port=servers.free_port(None),
            database_url=postgres.url, redis_url=valkey.url, gateway_processes=gateways,
        )  # fmt: skip
        made = Stack(settings.port, "", home, postgres.url, {"postgres": postgres.process, "valkey": valkey.process})
        exits.callback(_stop, made, [made.processes[name] for name in ("postgres", "valkey")])
        _start(made, settings, {"SWITCHYARD_UNSAFE_SERVERS": str(not durable), **(env or {})})
        made.key = _key(postgres.url, "bench")
        _wait(made, catalog.load(file, settings.models_dir))
        yield made


def ready_models(port: int) -> dict[str, str]:
    """The state of each model as the gateway on `port` sees it; empty while it does not answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        connection.request("GET", "/readyz")
        found: dict[str, str] = json.loads(connection.getresponse().read())["models"]
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return {}
    else:
        return found
    finally:
        connection.close()


def wait_for_ends(cursor: Cursor) -> None:
    """Until no job is queued or running."""
    while True:
        cursor.execute("SELECT FROM jobs WHERE status IN ('queued', 'running') LIMIT 1")
        if not cursor.rowcount:
            return
        time.sleep(0.5)


def cpu_s(pid: int) -> float:
    """CPU seconds used so far by a process and its living descendants."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = member.cpu_times()
                total += times.user + times.system
    return total


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without its own Switchyard settings, and `extra`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SWITCHYARD_")} | dict(extra)


def _start(made: Stack, settings: Settings, extra: Mapping[str, str]) -> None:
    declared = catalog.load(settings.config, settings.models_dir)
    urls = stack.Urls(settings.database_url, settings.redis_url)
    (made.home / "metrics").mkdir()
    common = {
        "SWITCHYARD_CONFIG": str(settings.config),
        "SWITCHYARD_MODELS_DIR": str(settings.models_dir),
        "SWITCHYARD_PORT": str(settings.port),
        "SWITCHYARD_GATEWAY_PROCESSES": str(settings.gateway_processes),
        **extra,
    }
    for spec in stack.plan(settings, declared, urls):
        if spec.name == "flower":
            continue
        start = functools.partial(
            spawn.spawn,
            spec.argv,
            env=environment(common | dict(spec.env)),
            cwd=ROOT,
            log=made.home / f"{spec.name}.log",
        )
        made.spawns[spec.name] = start
        process = start()
        if spec.once:
            if process.wait(READY_S) != 0:
                raise StackError(f"{spec.name} failed:\n{_tail(made, spec.name)}")
        else:
            made.processes[spec.name] = process


def _stop(made: Stack, kept: list[subprocess.Popen[bytes]]) -> None:
    ours = [process for process in made.processes.values() if process not in kept]
    for process in ours:
        spawn.kill_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    for process in ours:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0.1))
        spawn.kill_group(process.pid)
        process.wait()


def _wait(made: Stack, declared: catalog.Catalog) -> None:
    """Until every gateway knows every model."""
    deadline = time.monotonic() + READY_S
    gateways = [process.pid for name, process in made.processes.items() if name.startswith("gateway")]
    # The kernel gives each connection to one of those that listen, and does not say to which.
    wanted, seen = 1 if len(gateways) == 1 else _ASKED_TIMES * len(gateways), 0
    while True:
        states = ready_models(made.port)
        is_ready = bool(states) and all(states.get(name) == "ready" for name in declared.models)
        seen = seen + 1 if is_ready and all(_listens(pid, made.port) for pid in gateways) else 0
        if seen == wanted:
            return
        if is_ready and seen:
            continue
        for name, process in made.processes.items():
            if process.poll() is not None:
                raise StackError(f"{name} ended:\n{_tail(made, name)}")
        if time.monotonic() > deadline:
            raise StackError(f"not ready after {READY_S:g} s: {states or 'the gateway does not answer'}")
        time.sleep(0.05)


def _listens(pid: int, port: int) -> bool:
    try:
        sockets = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in sockets)


def _key(database_url: str, tenant: str, limits: Limits = NO_LIMITS) -> str:
    connection = session.connect(database_url, "switchyard-bench")
    try:
        with connection.cursor() as cursor:
            secret, _ = api_keys.create(cursor, "bench", tenant, limits=limits)
    finally:
        connection.close()
    return secret


def _tail(made: Stack, name: str) -> str:
    log = made.home / f"{name}.log"
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:]) if log.exists() else "(no log)"
