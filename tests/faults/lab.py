"""Where faults happen: two gateways, two echo workers and two reconcilers over a Postgres and a Valkey of their own,
with proxies on the lines between them, clients that keep a history, and a ledger that is audited.

    gateway-a, gateway-b ── proxies ──┐
    worker-a, reconciler-a ─ proxies ─┼── Postgres, Valkey
    worker-b, reconciler-b ───────────┘
"""

import contextlib
import functools
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis

from db import migrate, session
from local import servers
from tests.faults import audit
from tests.faults.history import Clients, History, Record
from tests.faults.proxy import Mode, Proxy
from tests.stack import ROOT, Stack, free_port

ECHO = """
backends:
  echo: {runtime: echo, concurrency: 64, max_queued: 400}
  lame: {runtime: echo, concurrency: 8, max_queued: 50}
models:
  echo: {path: echo, backends: [echo], context_length: 4096}
  lame: {path: echo, backends: [lame], context_length: 4096, auto: false}
limits: {body_bytes: 262144}
"""
REAL = """
backends:
  echo: {runtime: echo, concurrency: 64, max_queued: 400}
  lame: {runtime: echo, concurrency: 8, max_queued: 50}
  gpt: {runtime: gpt, concurrency: 16, options: {dtype: float32, max_batch_size: 16}}
  vllm: {runtime: vllm, concurrency: 16, options: {dtype: float32, max_num_seqs: 8, kv_cache_memory_gib: 0.25}}
models:
  echo: {path: echo, backends: [echo], context_length: 4096}
  lame: {path: echo, backends: [lame], context_length: 4096, auto: false}
  on-gpt: {path: smollm2-135m-instruct, backends: [gpt], context_length: 512, auto: false}
  on-vllm: {path: smollm2-135m-instruct, backends: [vllm], context_length: 512, auto: false}
limits: {body_bytes: 262144}
"""
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")
"""Version 1 of control groups."""
FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
FEATURES: Mapping[str, bool] = {
    "root": os.geteuid() == 0,
    "cgroups": os.access(MEMORY_GROUPS, os.W_OK) and os.geteuid() == 0,
    "networks": os.geteuid() == 0 and shutil.which("ip") is not None,
    "faketime": bool(FAKETIME),
    "history": (ROOT / ".git").exists() and shutil.which("git") is not None,
    "models": (ROOT / "models" / "smollm2-135m-instruct").exists(),
}
"""What rows may need, and whether this checkout has it."""
_PROMPT_S = 1.2
"""Less than SWITCHYARD_RESEND_AFTER_S of the test profile."""
_PROBE_S = 15.0

MIX = {"job": 4.0, "long": 3.0, "ask": 2.0, "cached": 1.0, "stream": 2.0, "cancel": 1.0, "keyed": 1.5, "foreign": 0.3}

NAMES = ("reconciler-a", "reconciler-b", "gateway-a", "gateway-b", "worker-a", "worker-b")


class Lab:
    """Everything of one run. Use it in a `with` block; nothing is left behind."""

    def __init__(
        self, folder: Path, seed: int, *, is_long: bool = False, rate: float = 20.0, config: str = ECHO
    ) -> None:
        self.folder, self.seed, self.is_long, self.rate, self._config = folder, seed, is_long, rate, config
        self.num_kills = 0
        self.history = History(folder / "history.jsonl")
        self._exits = contextlib.ExitStack()
        self._lock = threading.RLock()

    def __enter__(self) -> "Lab":
        with self._exits:
            self.postgres, self.valkey = self._exits.enter_context(servers.throwaway(durable=True))
            self.url = self.postgres.url
            migrate.upgrade(self.url)
            audit.install(self.url)
            self.proxies = {
                name: Proxy(self.postgres.spec.port if name.endswith("postgres") else self.valkey.spec.port)
                for name in (
                    "gateway-postgres",
                    "gateway-redis",
                    "worker-postgres",
                    "worker-redis",
                    "reconciler-postgres",
                )
            }
            for proxy in self.proxies.values():
                self._exits.callback(proxy.close)
            config = self.folder / "switchyard.yaml"
            config.write_text(self._config)
            self.stack = Stack(self.url, self.valkey.url, config, self.folder)
            self._exits.callback(self.stack.close)
            self.ports = {"gateway-a": self.stack.port, "gateway-b": free_port()}
            secrets = {"default": self.stack.secret, "other": self.stack.create_key("other")}
            urls = [f"http://127.0.0.1:{port}" for port in self.ports.values()]
            self.clients = Clients(self.history, urls, secrets, self.seed)
            self._exits.callback(self.clients.close)
            for name in NAMES:
                self.start(name)
            self._exits.enter_context(self._watching_cpu())
            self._exits = self._exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()
        self.history.close()

    # Processes.

    def start(self, name: str, **environment: str) -> None:
        """Start one process and wait until it serves."""
        self.stack.forget()
        kind = name.partition("-")[0]
        if kind == "gateway":
            port = self.ports.setdefault(name, free_port())
            self.stack.start_gateway(name, port, **self._through("gateway-postgres", "gateway-redis"), **environment)
        elif kind == "reconciler":
            way = self._through("reconciler-postgres", None) if name == "reconciler-a" else {}
            self.stack.start_reconciler(name, **way, **environment)
        else:
            way = self._through("worker-postgres", "worker-redis") if name == "worker-a" else {}
            url = audit.make_role(way.get("SWITCHYARD_DATABASE_URL", self.url), name, through=self.url)
            self.stack.start_worker("echo", name, 64, 30, **(way | {"SWITCHYARD_DATABASE_URL": url} | environment))

    def start_model_worker(self, backend: str, name: str, wait_s: float) -> None:
        """Start a worker of real models, which is no part of the lab otherwise."""
        self.stack.forget()
        url = audit.make_role(self.url, name, through=self.url)
        self.stack.start_worker(backend, name, 16, wait_s, SWITCHYARD_DATABASE_URL=url)

    def restart(self, name: str) -> None:
        """Replace one process, in good order."""
        self.stack.stop(name)
        self.start(name)

    def reap(self, name: str, within_s: float = 20) -> None:
        """Wait for a process that ends by itself; one that does not is killed, and the row has failed."""
        process = self.stack.processes[name]
        try:
            process.wait(within_s)
            self.num_kills += 1
        finally:
            process.kill()
            process.wait()
            del self.stack.processes[name]

    def kill(self, name: str) -> None:
        """SIGKILL one process."""
        with self._lock:
            if name in self.stack.processes:
                self.stack.kill(name)
                self.num_kills += 1

    @contextlib.contextmanager
    def frozen(self, *names: str) -> Iterator[None]:
        """SIGSTOP for the length of the block, then SIGCONT."""
        urls = [f"http://127.0.0.1:{self.ports[name]}" for name in names if name in self.ports]
        for url in urls:
            self.history.nemesis("frozen", url)
        pids = [self.stack.processes[name].pid for name in names]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            for url in urls:
                self.history.nemesis("thawed", url)

    @contextlib.contextmanager
    def locked(self, table: str, mode: str) -> Iterator[None]:
        """Hold a table lock for the length of the block."""
        connection = session.connect(self.url, "lab")
        connection.autocommit = False
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute("SET idle_in_transaction_session_timeout = 0")
            cursor.execute(f"LOCK TABLE {table} IN {mode}")
            yield

    @contextlib.contextmanager
    def severed(self) -> Iterator[None]:
        """Note in the history that the gateways' statements wait meanwhile, whatever it is that holds them up."""
        self.history.nemesis("severed")
        try:
            yield
        finally:
            self.history.nemesis("joined")

    def peek(self, gateway: str) -> None:
        """Note how many messages are in the queue while the rows of some calls cannot be committed."""
        url = f"http://127.0.0.1:{self.ports[gateway]}"
        client = self.clients
        with self.frozen("worker-a", "worker-b"), self.redis() as broker:
            broker.delete("echo")
            with self.locked("jobs", "SHARE MODE"):
                # Each frozen worker has asked for one message, and takes it without a word: send more than those.
                waiting = [client.begin(client.submit(client.nonce(), "default", {}, url=url)) for _ in range(8)]
                time.sleep(0.7)
                length = broker.llen("echo")
        seen = Record(op=self.history.next_op(), type="ok", kind="peek", at=time.monotonic(), num_messages=length)
        self.history.add(seen)
        for future in waiting:
            future.result(60)

    @contextlib.contextmanager
    def supervised(self) -> Iterator[None]:
        """Start again whatever exits, as a supervisor would."""
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(0.1):
                for name in self._gone():
                    self._revive(name)

        thread = threading.Thread(target=watch, name="supervisor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    # Traffic and what can be seen from outside.

    @contextlib.contextmanager
    def traffic(
        self, rate: float | None = None, mix: Mapping[str, float] | None = None, lead_s: float = 1.0
    ) -> Iterator[None]:
        """Clients for the length of the block, `lead_s` before it begins, and until each has its answer."""
        self.clients.start(rate or self.rate, mix or MIX)
        try:
            time.sleep(lead_s)
            yield
        finally:
            self.clients.stop()

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Look into the ledger over a connection of its own."""
        connection = session.connect(self.url, "lab")
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute(sql, values or None)
            return cursor.fetchall() if cursor.description else []

    def redis(self) -> "contextlib.closing[redis.Redis]":
        return contextlib.closing(redis.Redis.from_url(self.valkey.url, socket_timeout=20))

    def until(self, condition: Callable[[], bool], what: str, within_s: float = 20) -> float:
        """Poll a condition of the outside world; the seconds it took."""
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > within_s:
                raise AssertionError(f"no {what} within {within_s:.0f} s")
            time.sleep(0.02)
        return time.monotonic() - started

    def look(self) -> audit.Ledger:
        return audit.look(self.url)

    def count(self, status: str) -> int:
        return int(self.query("SELECT count(*) FROM jobs WHERE status = %s", status)[0][0])

    def restarts(self, since: float) -> list[float]:
        """Seconds from then until each job that was taken back ran again."""
        rows = self.query(
            """
            SELECT extract(epoch FROM min(again.at))::float8 - %s FROM job_transitions back
            JOIN job_transitions again ON again.job_id = back.job_id AND again.seq > back.seq AND again.became = 'running'
            WHERE back.was = 'running' AND back.became = 'queued' AND back.at >= to_timestamp(%s) GROUP BY back.seq
            """,
            since,
            since,
        )
        return [float(row[0]) for row in rows]

    def starts(self, since: float, job_ids: list[str]) -> list[float]:
        """Seconds from then until each of these jobs first ran."""
        rows = self.query(
            "SELECT extract(epoch FROM min(at))::float8 - %s FROM job_transitions "
            "WHERE became = 'running' AND job_id = ANY(%s::uuid[]) GROUP BY job_id",
            since,
            job_ids,
        )
        return [max(0.0, float(row[0])) for row in rows]

    def answers_again(self, within_s: float = 30) -> list[float]:
        """Seconds until each gateway completes a call, from now."""
        started, found = time.monotonic(), []
        for name in ("gateway-a", "gateway-b"):
            self.until(functools.partial(self._answers, name), f"prompt answer of {name}", within_s)
            found.append(time.monotonic() - started)
        return found

    def works(self, name: str) -> bool:
        """Whether this worker finishes one of a few jobs."""
        since = self.query("SELECT coalesce(max(seq), 0) FROM job_transitions")[0][0]
        for _ in range(6):
            self._answers("gateway-a")
            self._answers("gateway-b")
        sql = "SELECT count(*) FROM job_transitions WHERE seq > %s AND role = %s AND became = 'succeeded'"
        return bool(self.query(sql, since, name)[0][0])

    def heal(self) -> None:
        """End every fault, start what is gone, and see that capacity is back: a probe for each worker and gateway."""
        for proxy in self.proxies.values():
            proxy.set(Mode.PASS)
        for server in (self.postgres, self.valkey):
            if server.process.poll() is not None:
                server.restart()
        for _ in range(5):
            for name in self._gone():
                self._revive(name)
        for name in ("gateway-a", "gateway-b"):
            self._probe(name, functools.partial(self._answers, name))
        for name in ("worker-a", "worker-b"):
            self._probe(name, functools.partial(self.works, name))
        self._probe("worker-a", self._is_quiet)
        if not self._is_quiet():
            # Neither worker gives back what it does not run.
            self.kill("worker-b")
            self._revive("worker-b")

    def close_books(self) -> tuple[audit.Ledger, audit.Ledger]:
        """Wait until nothing is live, then look twice."""
        with contextlib.suppress(AssertionError):
            self.until(self._is_quiet, "quiet ledger", 60)
        before = audit.look(self.url)
        time.sleep(2)
        return before, audit.look(self.url)

    def times(self, short: int, long: int) -> int:
        return long if self.is_long else short

    @contextlib.contextmanager
    def _watching_cpu(self) -> Iterator[None]:
        """Note in the history when the whole machine is busy: slowness then is nobody's fault."""
        is_over = threading.Event()

        def watch() -> None:
            was_starved = False
            psutil.cpu_percent()
            while not is_over.wait(0.5):
                is_starved = psutil.cpu_percent() > 90
                if is_starved != was_starved:
                    self.history.nemesis("starved" if is_starved else "fed")
                was_starved = is_starved

        thread = threading.Thread(target=watch, name="cpu", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _through(self, postgres: str, valkey: str | None) -> dict[str, str]:
        """The environment of a process that reaches the servers by way of proxies."""
        found = {"SWITCHYARD_DATABASE_URL": _with_port(self.url, self.proxies[postgres].port)}
        if valkey is not None:
            found["SWITCHYARD_REDIS_URL"] = _with_port(self.valkey.url, self.proxies[valkey].port)
        return found

    def _gone(self) -> list[str]:
        with self._lock:
            running = {name for name, process in self.stack.processes.items() if process.poll() is None}
            for name in self.stack.processes.keys() - running:
                del self.stack.processes[name]
        return [name for name in NAMES if name not in running]

    def _revive(self, name: str) -> None:
        # What is being broken may well break again as it starts; whoever needs it waits for it.
        with contextlib.suppress(AssertionError, KeyError, httpx.HTTPError, *session.DependencyDown):
            self.start(name)

    def _answers(self, gateway: str) -> bool:
        """Whether a call succeeds before the reconciler could have sent its message again."""
        url = f"http://127.0.0.1:{self.ports[gateway]}"
        body = {"model": "echo", "prompt": "probe", "max_tokens": 10}
        headers = {"Authorization": f"Bearer {self.stack.secret}"}
        try:
            answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=5)
            return answer.status_code == 200 and answer.elapsed.total_seconds() < _PROMPT_S
        except httpx.HTTPError:
            return False

    def _is_quiet(self) -> bool:
        """Whether no job is left behind: the row's clients have gone."""
        return self.count("queued") + self.count("running") == 0

    def _probe(self, name: str, works: Callable[[], bool]) -> None:
        """Whether a process does its work again. One that does not is replaced, for the sake of the next row."""
        record = Record(op=self.history.next_op(), type="ok", kind="probe", at=time.monotonic(), url=name)
        try:
            self.until(works, f"work of {name}", _PROBE_S)
        except (AssertionError, *session.DependencyDown) as error:
            record.type, record.error = "info", str(error)
            with contextlib.suppress(ProcessLookupError):
                self.kill(name)
            self._revive(name)
        record.seconds = time.monotonic() - record.at
        self.history.add(record)


def _with_port(url: str, port: int) -> str:
    head, _, rest = url.rpartition("@")
    host, _, path = rest.partition("/")
    return f"{head}@{host.partition(':')[0]}:{port}/{path}"
