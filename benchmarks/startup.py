"""How long `make up` takes and what the running stack holds in memory.

    python -m benchmarks.startup [--config FILE] [--repeats 3] [--quick] [--json FILE]

The stack runs in a SWITCHYARD_HOME of its own on ports of its own, so one that is up already is not
touched. The first start initialises Postgres and is reported apart; the warm ones are those that follow.
`make up` returns when every model answers; a backend that loads longer than another of the same model
may not be done by then. Memory is read once every worker is ready: RSS counts a page in every process
that maps it, PSS shares it.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

import catalog
from benchmarks import report, stack
from db import session, workers
from local import servers, supervisor

LIMIT_S = 900.0

_MIB = 2**20


class StartupError(Exception):
    """`make` failed; the message has the end of what it printed."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one start."""

    up: float
    """Until `make up` returned: every model answers."""
    workers: float
    """Until every worker of every backend was ready."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A process of the stack and all its descendants, in MiB."""

    name: str
    processes: int
    rss: float
    pss: float | None
    """None where the kernel does not let us look (another account's process)."""


def main() -> None:
    parser = report.parser("startup", __doc__)
    parser.add_argument("--config", type=Path, default=stack.ROOT / "switchyard.yaml", help="what the stack serves")
    args = parser.parse_args()
    made = report.start("startup")
    repeats = 1 if args.quick else args.repeats
    with _home() as home:
        env = _environment(home, args.config)
        times: list[Times] = []
        memory: list[Memory] = []
        for index in range(repeats + 1):
            report.say(f"{'first' if index == 0 else 'warm'} start")
            with _up(env, home, args.config) as taken:
                times.append(taken)
                report.say(f"    up after {taken.up:.1f} s, every worker ready after {taken.workers:.1f} s")
                memory = memory_of(home)
    made.add(_times_table(times))
    made.add(_memory_table(memory))
    made.save(args.json)


def memory_of(home: Path) -> list[Memory]:
    """What the processes of the stack under `home` hold, by the supervisor's names."""
    state = supervisor.read_state(home)
    leaders = {"supervisor": state["pid"]} | {c["name"]: c["pid"] for c in state["children"] if c["pid"]}
    others = set(leaders.values())
    return [_memory(name, pid, others - {pid}) for name, pid in leaders.items()]


def _memory(name: str, pid: int, others: set[int]) -> Memory:
    """The tree under `pid`, without the branches that other names head."""
    rss, pss, count = 0, 0, 0
    is_whole = True
    for process in _tree(pid, others):
        with contextlib.suppress(psutil.NoSuchProcess):
            rss += process.memory_info().rss
            count += 1
            try:
                pss += process.memory_full_info().pss
            except psutil.AccessDenied:
                is_whole = False
    return Memory(name, count, rss / _MIB, pss / _MIB if is_whole else None)


def _tree(pid: int, others: set[int]) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        yield process
        for child in process.children():
            if child.pid not in others:
                yield from _tree(child.pid, others)


@contextlib.contextmanager
def _home() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="switchyard-bench-"))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _environment(home: Path, config: Path) -> Mapping[str, str]:
    return stack.environment(
        {
            "SWITCHYARD_HOME": str(home),
            "SWITCHYARD_CONFIG": str(config.absolute()),
            "SWITCHYARD_PORT": str(servers.free_port(None)),
            "SWITCHYARD_FLOWER_PORT": str(servers.free_port(None)),
            # A .env in the checkout may name servers of the user's; empty means the embedded ones.
            "SWITCHYARD_DATABASE_URL": "",
            "SWITCHYARD_REDIS_URL": "",
        }
    )


@contextlib.contextmanager
def _up(env: Mapping[str, str], home: Path, config: Path) -> Iterator[Times]:
    """A stack with all its workers ready."""
    try:
        began = time.perf_counter()
        _make("up", env)
        up = time.perf_counter() - began
        _wait_for_workers(home, catalog.load(config, stack.ROOT / "models"))
        yield Times(up, time.perf_counter() - began)
    finally:
        _make("down", env)


def _wait_for_workers(home: Path, declared: catalog.Catalog) -> None:
    wanted = {name: backend.entry.workers for name, backend in declared.backends.items()}
    deadline = time.monotonic() + LIMIT_S
    connection = session.connect(servers.urls(home)[0], "switchyard-bench")
    with contextlib.closing(connection), connection.cursor() as cursor:
        while True:
            ready = Counter(life.backend for life in workers.alive(cursor) if life.state == "ready")
            late = [name for name, number in wanted.items() if ready[name] < number]
            if not late:
                return
            if time.monotonic() > deadline:
                raise StartupError(f"not ready after {LIMIT_S:g} s: {', '.join(late)}")
            time.sleep(0.1)


def _make(command: str, env: Mapping[str, str]) -> None:
    argv = [shutil.which("make") or "make", "--no-print-directory", command]
    done = subprocess.run(
        argv, cwd=stack.ROOT, env=dict(env), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise StartupError(f"make {command} failed:\n{tail}")


def _times_table(times: list[Times]) -> report.Table:
    first, *warm = times
    rows: list[tuple[report.Cell, ...]] = [
        ("first start: an empty home", report.spread([first.up], 1), report.spread([first.workers], 1)),
        ("warm start", report.spread([one.up for one in warm], 1), report.spread([one.workers for one in warm], 1)),
    ]
    load = f"load average {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores"
    columns = ("seconds", "make up: every model answers", "every worker ready")
    return report.Table("Start of the whole stack", columns, rows, (load,))


def _memory_table(memory: list[Memory]) -> report.Table:
    rows: list[tuple[report.Cell, ...]] = [
        (one.name, str(one.processes), f"{one.rss:,.0f}", None if one.pss is None else f"{one.pss:,.0f}")
        for one in memory
    ]
    pss = [one.pss for one in memory if one.pss is not None]
    whole = len(pss) == len(memory)
    rows.append((
        "all", str(sum(one.processes for one in memory)), f"{sum(one.rss for one in memory):,.0f}",
        f"{sum(pss):,.0f}" if whole else None,
    ))  # fmt: skip
    return report.Table("Memory of the running stack, MiB", ("process", "processes", "RSS", "PSS"), rows)


if __name__ == "__main__":
    main()
