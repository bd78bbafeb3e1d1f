"""This tree beside earlier revisions of it: what a change cost, on a miss and on a cache hit.

    python -m benchmarks.revisions --against REV [REV ...] [--repeats 3] [--quick] [--json FILE]

Each revision is unpacked next to this tree and started with its own code, servers and processes, in this environment;
then all are measured in turns with the echo backend, which takes no time. A miss is a durable job; `x-cache` is checked
on every answer of either kind.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import cache, echo, report, stack
from benchmarks.contender import Contender, first_answer
from benchmarks.load import Target

CONCURRENCY = 64
RATE = 50.0
ALLOWED = 10
"""Per cent by which a change may be slower."""

# Runs in the other tree, with the modules of that tree.
_SERVE = """
import json, sys
from benchmarks import stack
with stack.running(stack.ECHO) as running:
    pids = {name: process.pid for name, process in running.processes.items()}
    print(json.dumps({"port": running.port, "key": running.key, "pids": pids}), flush=True)
    sys.stdin.read()
"""


@dataclasses.dataclass(slots=True)
class Side:
    """A revision that answers."""

    name: str
    miss: Contender
    hit: Contender


def main() -> None:
    parser = report.parser("revisions", __doc__)
    parser.add_argument("--against", nargs="+", required=True, metavar="REV", help="commits, tags or branches")
    args = parser.parse_args()
    made = report.start("revisions")
    seconds, repeats = (2.0, 1) if args.quick else (5.0, args.repeats)
    with contextlib.ExitStack() as exits:
        sides = [
            _side("this tree", stack.ROOT, exits),
            *[_side(revision, exits.enter_context(_unpacked(revision)), exits) for revision in args.against],
        ]
        for repeat in range(repeats):
            # Who comes first finds the machine as the last repeat left it, so they take turns in that as well.
            for side in sides[repeat % len(sides) :] + sides[: repeat % len(sides)]:
                for kind, contender in (("miss", side.miss), ("hit", side.hit)):
                    report.say(f"{repeat + 1}/{repeats} {side.name}, {kind}")
                    contender.closed_loop(CONCURRENCY, seconds)
                    contender.open_loop(RATE, seconds * 1.6)
    for kind in ("miss", "hit"):
        contenders = [(side.name, getattr(side, kind)) for side in sides]
        made.add(_table(kind, contenders, repeats))
        made.add(_cpu_table(kind, contenders))
    made.save(args.json)


@contextlib.contextmanager
def _unpacked(revision: str) -> Iterator[Path]:
    """A folder with the tree of the revision."""
    with tempfile.TemporaryDirectory(prefix="switchyard-revision-") as folder:
        argv = ["git", "-C", str(stack.ROOT), "archive", "--format=tar", revision]
        packed = subprocess.run(argv, capture_output=True, check=False)
        if packed.returncode != 0:
            sys.exit(f"{revision}: {packed.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
        yield Path(folder)


def _side(name: str, tree: Path, exits: contextlib.ExitStack) -> Side:
    report.say(f"starting {name}")
    environment = stack.environment({"PYTHONPATH": str(tree)})
    argv = [sys.executable, "-c", _SERVE]
    process = subprocess.Popen(
        argv, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    exits.callback(process.wait)
    assert process.stdin is not None
    assert process.stdout is not None
    exits.callback(process.stdin.close)
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{name} did not start")
    served = json.loads(line)

    def cpu() -> dict[str, float]:
        return {process: stack.cpu_s(pid) for process, pid in served["pids"].items()}

    headers = {"authorization": f"Bearer {served['key']}"}
    miss = Target(served["port"], echo.BODY, headers=headers, expected=b"x-cache: bypass")
    hit = dataclasses.replace(miss, body=cache.HOT, expected=b"x-cache: hit")
    first_answer(hit)
    return Side(name, Contender(name, miss, cpu), Contender(name, hit, cpu))


def _table(kind: str, contenders: list[tuple[str, Contender]], repeats: int) -> report.Table:
    closed, opened = f"{CONCURRENCY} callers", f"{RATE:g}/s"
    rows: list[tuple[report.Cell, ...]] = [
        (
            name,
            report.spread(one.rates(closed)),
            report.spread(one.latencies_ms(closed, 0.5), 1),
            report.spread(one.latencies_ms(closed, 0.99), 1),
            report.spread(one.latencies_ms(opened, 0.5), 1),
            report.spread(one.latencies_ms(opened, 0.99), 1),
            report.spread(one.total_cpu_ms(closed), 2),
        )
        for name, one in contenders
    ]
    (_, mine), *others = contenders
    for name, other in others:
        rows.append((
            f"this tree to {name}",
            _ratio(mine.rates(closed), other.rates(closed)),
            *[_ratio(mine.latencies_ms(closed, share), other.latencies_ms(closed, share)) for share in (0.5, 0.99)],
            *[_ratio(mine.latencies_ms(opened, share), other.latencies_ms(opened, share)) for share in (0.5, 0.99)],
            _ratio(mine.total_cpu_ms(closed), other.total_cpu_ms(closed)),
        ))  # fmt: skip
    columns = ("", "req/s", "p50 ms", "p99 ms", f"p50 ms at {opened}", f"p99 ms at {opened}", "CPU ms/req")
    notes = (
        f"{closed} unless said otherwise; median (lowest–highest) of {repeats}, in turns; ratios of the repeats",
        f"a change may cost {ALLOWED} %",
    )
    return report.Table(f"Echo backend, 0 ms, {kind}", columns, rows, notes)


def _cpu_table(kind: str, contenders: list[tuple[str, Contender]]) -> report.Table:
    closed = f"{CONCURRENCY} callers"
    names = list(dict.fromkeys(name for _, one in contenders for name in one.cpu_ms[closed][0]))
    rows: list[tuple[report.Cell, ...]] = [
        (
            side,
            *[report.median(one.cpu_ms_of(closed, name)) if name in one.cpu_ms[closed][0] else None for name in names],
        )
        for side, one in contenders
    ]
    return report.Table(f"CPU milliseconds a {kind} by process, {closed}", ("", *names), rows)


def _ratio(mine: list[float], others: list[float]) -> str:
    return report.spread([one / other for one, other in zip(mine, others, strict=True)], 2)


if __name__ == "__main__":
    main()
