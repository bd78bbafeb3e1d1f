"""A running Switchyard for tests: real Postgres, real Redis protocol, real processes, real sockets."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from db import api_keys, migrate, session

ROOT = Path(__file__).parent.parent
PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Which of the processes that share the suite this one is, from 0 on."""
CELERY_OPTIONS = ["--without-gossip", "--without-mingle", "-l", "WARNING"]


class Stack:
    """Gateway, workers and reconciler over one database and one Redis. Every process is ours and dies with us."""

    def __init__(self, database_url: str, redis_url: str, config: Path, logs: Path) -> None:
        self.database_url, self.redis_url = database_url, redis_url
        self.logs = logs
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SWITCHYARD_DATABASE_URL": database_url,
            "SWITCHYARD_REDIS_URL": redis_url,
            "SWITCHYARD_CONFIG": str(config),
            "SWITCHYARD_MODELS_DIR": str(ROOT / "models"),
            "SWITCHYARD_LEASE_S": "4",
            "SWITCHYARD_HEARTBEAT_S": "0.5",
            "SWITCHYARD_SWEEP_S": "0.3",
            "SWITCHYARD_RESEND_AFTER_S": "1.5",
            "SWITCHYARD_DRAIN_S": "10",
            "SWITCHYARD_UNSAFE_SERVERS": "true",
            "CELERY_CUSTOM_WORKER_POOL": "tasks.pool:TaskPool",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.patches: dict[str, str] = {}
        """Python that the process of that name runs before its own program: how a test breaks the product's code."""
        self.outputs: dict[str, int] = {}
        """Where the process of that name writes its log, instead of into a file."""
        self.roots: dict[str, Path] = {}
        """The checkout that the process of that name runs, if not this one."""
        self._connection: session.Connection | None = None
        self.secret = self.create_key("default")

    def create_key(self, tenant: str, *, is_admin: bool = False) -> str:
        connection = session.connect(self.database_url, "tests")
        with contextlib.closing(connection), connection.cursor() as cursor:
            secret, _ = api_keys.create(cursor, "tests", tenant, is_admin=is_admin)
            return secret

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Look into the ledger, past the product's own code."""
        if self._connection is None or self._connection.closed:
            self._connection = session.connect(self.database_url, "tests")
        with self._connection.cursor() as cursor:
            cursor.execute(sql, values)
            return cursor.fetchall() if cursor.description else []

    def forget(self) -> None:
        """Look into the ledger over a new connection next time: Postgres may have been restarted."""
        if self._connection is not None:
            self._connection.close()

    def start_gateway(self, name: str = "gateway", port: int | None = None, **environment: str) -> None:
        """Start a gateway, on a port of its own if it is not the first, and wait until it is ready."""
        port = port or self.port
        self._start(name, ["-m", "api.server"], {"SWITCHYARD_PORT": str(port), **environment})
        self.wait_until(lambda: self._is_up(port), f"{name} up")

    def start_reconciler(self, name: str = "reconciler", **environment: str) -> None:
        self._start(name, ["-m", "tasks.reconciler"], environment)

    def start_batcher(self, name: str = "batcher", **environment: str) -> None:
        self._start(name, ["-m", "api.batcher"], environment)

    def start_worker(
        self, backend: str, name: str | None = None, slots: int = 64, wait_s: float = 30, **environment: str
    ) -> None:
        """Start a worker and wait until it has loaded and registered as ready."""
        name = name or backend
        argv = [
            "-m",
            "celery",
            "-A",
            "tasks",
            "worker",
            "-P",
            "custom",
            "-c",
            str(slots),
            "-Q",
            backend,
        ]
        argv += ["-n", f"{name}@%h", "-E", *CELERY_OPTIONS]
        # The row of one of that name that was killed may say "ready" for a while yet.
        before = self.query("SELECT coalesce(max(id), 0) FROM workers")[0][0]
        self._start(name, argv, {"SWITCHYARD_BACKEND": backend, "SWITCHYARD_WORKER_NAME": name, **environment})
        ready = "SELECT 1 FROM workers WHERE name = %s AND state = 'ready' AND id > %s"
        self.wait_until(lambda: bool(self.query(ready, name, before)), f"worker {name} ready", wait_s)
        if any(known.startswith("gateway") for known in self.processes):
            self.wait_until(lambda: self._serves(backend), f"gateway knows {name}")

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Signal one process, and only it; its children are its own business."""
        os.kill(self.processes[name].pid, number)
        if number == signal.SIGKILL:
            self.processes.pop(name).wait()

    def stop(self, name: str, within_s: float = 30) -> int:
        """SIGTERM one process and wait for it; its exit status."""
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(within_s)

    def close(self) -> None:
        for name in reversed(list(self.processes)):
            process = self.processes[name]
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()
        if self._connection is not None:
            self._connection.close()

    def client(self, secret: str | None = None, timeout_s: float = 30) -> httpx.Client:
        headers = {"Authorization": f"Bearer {secret or self.secret}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s)

    def read_stream(self, path: str, body: dict[str, Any], **headers: str) -> "StreamReader":
        """Ask for a stream and read it in the background."""
        return StreamReader(self.client(timeout_s=300), path, body, headers)

    def wait_until(self, condition: Callable[[], bool], what: str, within_s: float = 20) -> None:
        """Poll a condition of the outside world; a process that died meanwhile fails the wait at once."""
        deadline = time.monotonic() + within_s
        while not condition():
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise AssertionError(f"{name} exited with {process.returncode}:\n{self.log(name)}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} within {within_s} s\n" + "\n".join(map(self.log, self.processes)))
            time.sleep(0.05)

    def log(self, name: str) -> str:
        text = (self.logs / f"{name}.log").read_text(errors="replace")
        return f"--- {name}\n" + "\n".join(text.splitlines()[-25:])

    def _start(self, name: str, argv: list[str], extra: dict[str, str]) -> None:
        """`argv` is `-m`, a module and its arguments."""
        if name in self.patches:
            run = f"import runpy; runpy.run_module({argv[1]!r}, run_name='__main__', alter_sys=True)"
            argv = ["-c", f"{self.patches[name]}\n{run}", *argv[2:]]
        root = self.roots.get(name, ROOT)
        with (self.logs / f"{name}.log").open("ab") as log:
            output = self.outputs.get(name, log.fileno())
            self.processes[name] = subprocess.Popen(
                [sys.executable, *argv],
                cwd=root,
                env=self.environment | extra | {"PYTHONPATH": str(root)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _is_up(self, port: int) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def _serves(self, backend: str) -> bool:
        models = httpx.get(f"{self.url}/v1/models", headers={"Authorization": f"Bearer {self.secret}"}).json()["data"]
        return all(model["state"] == "ready" for model in models if model["backends"] == [backend])


class StreamReader:
    """A client that reads a stream in a thread of its own, while the test does something to the servers."""

    def __init__(self, client: httpx.Client, path: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._error: Exception | None = None
        self._request = (client, path, body, headers)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_for(self, num_lines: int, within_s: float = 60) -> None:
        """Until that many lines have arrived."""
        deadline = time.monotonic() + within_s
        while len(self.lines) < num_lines:
            assert self._thread.is_alive(), f"the stream ended after {len(self.lines)} lines: {self._error}"
            assert time.monotonic() < deadline, f"{len(self.lines)} of {num_lines} lines within {within_s} s"
            time.sleep(0.01)

    def finish(self, within_s: float = 60) -> list[dict[str, Any]]:
        """Wait for the end; the frames before `[DONE]`, after a check that their ids count from 1 without a gap."""
        self._thread.join(within_s)
        assert not self._thread.is_alive(), f"the stream did not end within {within_s} s"
        if self._error is not None:
            raise self._error
        frames = [line.removeprefix("data: ") for line in self.lines if line.startswith("data: ")]
        assert frames[-1] == "[DONE]", frames[-1]
        numbers = [int(line.removeprefix("id: ")) for line in self.lines if line.startswith("id: ")]
        assert numbers == list(range(1, len(numbers) + 1))
        return [json.loads(frame) for frame in frames[:-1]]

    def text(self, within_s: float = 60) -> str:
        """All deltas of a one-choice stream in one string."""
        choices = [choice for frame in self.finish(within_s) for choice in frame["choices"]]
        return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)

    def _read(self) -> None:
        client, path, body, headers = self._request
        try:
            with client, client.stream("POST", path, json=body | {"stream": True}, headers=headers) as response:
                for line in response.iter_lines():
                    self.lines.append(line)
        except Exception as error:
            self._error = error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def fresh_database(server_url: str, name: str) -> Iterator[str]:
    """An empty, migrated database of that name, and this process's, on the server; gone afterwards."""
    base, _, _ = server_url.rpartition("/")
    name = f"{name}_{PROCESS}"
    connection = session.connect(server_url, "tests")
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        cursor.execute(f"CREATE DATABASE {name}")
        migrate.upgrade(f"{base}/{name}")
        try:
            yield f"{base}/{name}"
        finally:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
