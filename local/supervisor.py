"""The process supervisor: starts what a plan lists, restarts what dies, stops it all in order.

One process, one thread. Every process of the plan is its direct child and leads its own session, so
that a dead worker's helpers can be killed with it. `state.json` under SWITCHYARD_HOME says what runs;
a lock file held for life says that the supervisor itself does. SIGTERM stops everything. If the
supervisor is killed, the kernel ends its children, and the next start clears away what is left.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from local import spawn
from local.servers import clear_stale_lock, postgres_is_ready, server_env, write_private

STATE_FILE = "state.json"
PLAN_FILE = "plan.json"
LOCK_FILE = "supervisor.lock"

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
HEALTHY_S = 30.0
"""A process that ran this long starts again at the shortest back-off."""

LOG_BYTES = 10_000_000
"""A longer log is moved to `<name>.log.1`, of which there is one."""

KILLED_S = 10.0

log = logging.getLogger("switchyard.supervisor")


@dataclass(frozen=True, slots=True)
class Spec:
    """One process of the plan. Order is start order; servers stop last, in the opposite order."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    """Added to the supervisor's own environment; a server gets a bare one."""
    is_server: bool = False
    delay_s: float = 0.0
    """Waits this long after the process before it, at the first start only."""
    once: bool = False
    """Runs to its end; what follows starts after exit status 0."""
    postgres_data: str = ""
    """Postgres's data folder: cleared of a stale lock before a start, and watched for readiness."""
    port: int = 0
    """Ready when this port of the loopback address accepts."""
    uid: int | None = None
    stop_signal: int = signal.SIGTERM
    death_signal: int = signal.SIGKILL
    stop_s: float = 20.0


@dataclass(slots=True)
class Child:
    """A spec and what has become of it."""

    spec: Spec
    process: subprocess.Popen[bytes] | None = None
    state: str = "waiting"
    restarts: int = 0
    ticks: int = 0
    since: float = field(default_factory=time.time)
    last_exit: str = ""
    failures: int = 0
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    is_up: asyncio.Event = field(default_factory=asyncio.Event)

    def turn(self, state: str) -> None:
        self.state, self.since = state, time.time()


class Supervisor:
    """Keeps the processes of `specs` running until `stop` is set."""

    def __init__(self, home: Path, specs: list[Spec]) -> None:
        self.home = home
        self.children = [Child(spec) for spec in specs]
        self.stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stop.set)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        self._write_state()
        self._background(self._start_all())
        self._background(self._rotate_logs())
        await self.stop.wait()
        log.info("stopping")
        for task in self._tasks:
            task.cancel()
        await self._stop_all()
        self._write_state()

    async def _start_all(self) -> None:
        for child in self.children:
            await asyncio.sleep(child.spec.delay_s)
            self._background(self._keep(child))
            await child.is_up.wait()

    async def _keep(self, child: Child) -> None:
        """Start, watch, wait a little longer after each quick death, start again."""
        while True:
            started = time.monotonic()
            if self._start(child):
                await self._watch(child)
            if child.spec.once and child.last_exit == "exit 0":
                child.turn("done")
                child.is_up.set()
                self._write_state()
                return
            is_healthy = time.monotonic() - started >= HEALTHY_S
            child.failures = 1 if is_healthy else child.failures + 1
            delay = BACKOFF_S[min(child.failures, len(BACKOFF_S)) - 1]
            child.turn("backoff")
            log.warning("%s ended (%s); again in %g s", child.spec.name, child.last_exit, delay)
            self._write_state()
            await asyncio.sleep(delay)
            child.restarts += 1

    def _start(self, child: Child) -> bool:
        spec = child.spec
        child.exited.clear()
        try:
            if spec.postgres_data:
                clear_stale_lock(Path(spec.postgres_data))
            child.process = spawn.spawn(
                spec.argv,
                env=(server_env() if spec.is_server else os.environ) | spec.env,
                cwd=Path("/") if spec.is_server else None,
                log=log_file(self.home, spec.name),
                account=None if spec.uid is None else spawn.Account.of_uid(spec.uid),
                death_signal=spec.death_signal,
            )
        except Exception as error:
            # Whatever it is, the other processes must go on.
            child.process, child.last_exit = None, str(error)
            return False
        child.ticks = spawn.start_ticks(child.process.pid)
        child.turn("starting" if spec.postgres_data or spec.port or spec.once else "running")
        log.info("%s started, pid %d", spec.name, child.process.pid)
        self._write_state()
        return True

    async def _watch(self, child: Child) -> None:
        """Return when the process has ended; note on the way that it became ready."""
        while child.state == "starting" and not child.spec.once:
            if self._is_ready(child):
                child.turn("running")
                self._write_state()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.exited.wait(), 0.02)
                return
        if child.state == "running":
            child.is_up.set()
        await child.exited.wait()

    def _is_ready(self, child: Child) -> bool:
        assert child.process
        if child.spec.postgres_data:
            return postgres_is_ready(Path(child.spec.postgres_data), child.process.pid)
        with socket.socket() as probe:
            probe.settimeout(0.5)
            return probe.connect_ex(("127.0.0.1", child.spec.port)) == 0

    def _reap(self) -> None:
        """Collect every dead process: our own, and those inherited from a dead child.

        A child's group is killed before the child is collected: until then its number cannot have
        been given to somebody else.
        """
        own = {child.process.pid: child for child in self.children if child.process}
        with contextlib.suppress(ChildProcessError):
            while dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                child = own.get(dead.si_pid)
                if child is None or child.process is None:
                    os.waitpid(dead.si_pid, 0)
                    continue
                spawn.kill_group(dead.si_pid)
                forget_metrics(child.spec, dead.si_pid)
                child.last_exit = _describe(child.process.wait())
                child.process = None
                child.exited.set()

    async def _stop_all(self) -> None:
        await asyncio.gather(*(self._stop(child) for child in self.children if not child.spec.is_server))
        for child in reversed(self.children):
            if child.spec.is_server:
                await self._stop(child)

    async def _stop(self, child: Child) -> None:
        if child.process is not None:
            began = time.monotonic()
            child.turn("stopping")
            self._write_state()
            # Not `Popen.send_signal`: it would collect a process that has just ended, unseen by `_reap`.
            os.kill(child.process.pid, child.spec.stop_signal)
            try:
                await asyncio.wait_for(child.exited.wait(), child.spec.stop_s)
            except TimeoutError:
                log.warning("%s did not stop within %g s: killed", child.spec.name, child.spec.stop_s)
                spawn.kill_group(child.process.pid)
                await child.exited.wait()
            log.info("%s stopped (%s) in %.1f s", child.spec.name, child.last_exit, time.monotonic() - began)
        child.turn("stopped")
        self._write_state()

    async def _rotate_logs(self) -> None:
        while True:
            for child in self.children:
                rotate(log_file(self.home, child.spec.name))
            await asyncio.sleep(5.0)

    def _write_state(self) -> None:
        children = [
            {
                "name": child.spec.name,
                "pid": child.process.pid if child.process else 0,
                "ticks": child.ticks,
                "state": child.state,
                "since": child.since,
                "restarts": child.restarts,
                "last_exit": child.last_exit,
                "stop_signal": int(child.spec.stop_signal) if child.spec.is_server else int(signal.SIGKILL),
            }
            for child in self.children
        ]
        me = {"pid": os.getpid(), "ticks": spawn.start_ticks(os.getpid()), "boot": spawn.boot_id()}
        write_private(self.home / STATE_FILE, json.dumps(me | {"children": children}, indent=1))

    def _background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def write_plan(home: Path, specs: list[Spec]) -> None:
    """Leave `specs` for the supervisor to read; they hold passwords, so only the owner may."""
    write_private(home / PLAN_FILE, json.dumps([asdict(spec) for spec in specs], indent=1))


def read_state(home: Path) -> dict[str, Any]:
    """What the last supervisor of `home` wrote, whether it still runs or not; empty if there was none."""
    try:
        state: dict[str, Any] = json.loads((home / STATE_FILE).read_text())
    except FileNotFoundError:
        return {}
    return state


def is_running(home: Path) -> bool:
    """Whether a supervisor of `home` is alive. Survives reboots and kill -9: the lock is the kernel's."""
    with contextlib.suppress(BlockingIOError, FileNotFoundError), locked(home / LOCK_FILE):
        return False
    return (home / LOCK_FILE).exists()


@contextlib.contextmanager
def locked(path: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`. Raises BlockingIOError where another process holds it."""
    deadline = time.monotonic() + patience_s
    with path.open("a") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.02)
        yield


def log_file(home: Path, name: str) -> Path:
    return home / "logs" / f"{name}.log"


def rotate(path: Path, limit: int = LOG_BYTES) -> None:
    """Keep `path` below about `limit` bytes. The writer keeps its handle: the file is copied, then emptied."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > limit:
            shutil.copyfile(path, path.with_name(f"{path.name}.1"))
            path.with_name(f"{path.name}.1").chmod(0o600)
            os.truncate(path, 0)


def forget_metrics(spec: Spec, pid: int) -> None:
    """Drop a dead process's live gauges from the metrics files it shared with the others."""
    if folder := spec.env.get("PROMETHEUS_MULTIPROC_DIR"):
        for file in Path(folder).glob(f"gauge_live*_{pid}.db"):
            file.unlink(missing_ok=True)


def clear_leftovers(home: Path) -> int:
    """End what a killed supervisor of `home` left running; returns how many processes that were.

    Only processes it recorded, in the same boot, in a session that one of its children founded.
    """
    state = read_state(home)
    if state.get("boot") != spawn.boot_id():
        return 0
    ended = 0
    for child in state["children"]:
        for pid in _left_of(child):
            ended += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, child["stop_signal"])
    deadline = time.monotonic() + KILLED_S
    while left := [pid for child in state["children"] for pid in _left_of(child)]:
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return ended


def main() -> None:
    """Supervise the plan that lies in the folder named by the first argument."""
    home = Path(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    specs = [Spec(**entry) for entry in json.loads((home / PLAN_FILE).read_text())]
    try:
        # `is_running` holds the lock for an instant.
        with locked(home / LOCK_FILE, patience_s=1.0):
            spawn.adopt_orphans()
            if ended := clear_leftovers(home):
                log.warning("ended %d processes of a supervisor that was killed", ended)
            asyncio.run(_run(home, specs))
    except BlockingIOError:
        sys.exit(f"a supervisor already runs under {home}")


async def _run(home: Path, specs: list[Spec]) -> None:
    await Supervisor(home, specs).run()


def _left_of(child: dict[str, Any]) -> list[int]:
    if not child["pid"]:
        return []
    # A session's number is not given out again while the session has a member.
    found = [pid for pid in spawn.members(child["pid"]) if spawn.start_ticks(pid) >= child["ticks"]]
    leader = spawn.start_ticks(child["pid"])
    return [] if leader and leader != child["ticks"] else found


def _describe(status: int) -> str:
    """`exit 1`, or the name of the signal."""
    return f"exit {status}" if status >= 0 else signal.Signals(-status).name


if __name__ == "__main__":
    main()
