"""What the gateway itself costs: durable jobs a second and added latency, with a backend that takes no time.

    python -m benchmarks.echo [--no-peers] [--peers-dir DIR] [--repeats 3] [--quick] [--json FILE]

Every request is a job: stored in Postgres, sent through the queue, run by a worker, its answer stored
and then returned (`x-cache: BYPASS` is checked on each). Beside it, in turns within the same run, other
gateways in front of an upstream that answers the same bytes at once; they store nothing.
"""

import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import load, peers, report, stack
from benchmarks.load import Result, Target
from local import servers

BODY = json.dumps(
    {"model": "echo", "messages": [{"role": "user", "content": "Question {number}: what does a gateway cost?"}]}
)
CONCURRENCIES = (64, 256)
RATE = 50.0
AIM = "aim: at least 600 jobs/s, and 12 ms at the median at 50 requests/s"

Cpu = Callable[[], Mapping[str, float]]


@dataclass(slots=True)
class Contender:
    """Something that answers, and what was measured of it."""

    name: str
    target: Target
    cpu: Cpu
    results: dict[str, list[Result]] = field(default_factory=dict)
    cpu_ms: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """CPU milliseconds a request, by process."""
    failure: str | None = None


def main() -> None:
    parser = report.parser("echo", __doc__)
    parser.add_argument("--no-peers", action="store_true", help="measure Switchyard alone")
    parser.add_argument("--peers-dir", type=Path, default=peers.DEFAULT_FOLDER, help="where the peers are installed")
    args = parser.parse_args()
    made = report.start("echo")
    seconds, repeats = (2.0, 1) if args.quick else (5.0, args.repeats)
    with contextlib.ExitStack() as exits:
        contenders = _own(exits)
        failures = {} if args.no_peers else _add_peers(contenders, args.peers_dir, exits)
        for repeat in range(repeats):
            for contender in contenders:
                report.say(f"{repeat + 1}/{repeats} {contender.name}")
                _measure(contender, seconds)
    made.add(_summary(contenders, failures, repeats))
    made.add(_cpu_table(contenders[0]))
    made.save(args.json)


def first_answer(port: int, headers: Mapping[str, str], body: str) -> bytes:
    """The body of one answer, waiting until there is one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60.0)
    try:
        connection.request(
            "POST", "/v1/chat/completions", body, {"content-type": "application/json", **headers}
        )
        answer = connection.getresponse()
        found = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise load.LoadError(f"{answer.status}: {found[:300].decode(errors='replace')}")
    return found


def _own(exits: contextlib.ExitStack) -> list[Contender]:
    """Switchyard with fsync on, as it ships, and off, to show what durability costs."""
    contenders = []
    for name, durable in (("switchyard", True), ("switchyard, fsync off", False)):
        report.say(f"starting {name}")
        running = exits.enter_context(stack.running(stack.ECHO, durable=durable))
        target = Target(running.port, BODY, headers=running.headers(), expected=b"x-cache: bypass")
        contenders.append(Contender(name, target, running.cpu_s))
    return contenders


def _add_peers(contenders: list[Contender], folder: Path, exits: contextlib.ExitStack) -> dict[str, str]:
    """Start the upstream and every peer; answers why each of the others could not be had."""
    folder.mkdir(parents=True, exist_ok=True)
    own = contenders[0].target
    answer = folder / "answer.json"
    answer.write_bytes(first_answer(own.port, own.headers, BODY.replace("{number}", "0" * 12)))
    port = servers.free_port(None)
    argv = [sys.executable, "-m", "benchmarks.upstream", str(port), str(answer)]
    upstream = exits.enter_context(peers.process(argv, f"http://127.0.0.1:{port}/", folder / "upstream.log"))
    failures: dict[str, str] = {}
    for name, starter in peers.STARTERS.items():
        report.say(f"starting {name} (the first time installs it)")
        try:
            peer = exits.enter_context(starter(folder, port))
            target = Target(peer.port, BODY, headers=peer.headers)
            first_answer(target.port, target.headers, BODY)
        except (peers.PeerError, load.LoadError, OSError) as error:
            failures[name] = f"{error}"
            continue
        contenders.append(Contender(peer.name, target, _cpu_of(peer.name, peer.process)))
    contenders.append(Contender("no-op upstream itself", Target(port, BODY), _cpu_of("upstream", upstream)))
    return failures


def _cpu_of(name: str, process: "subprocess.Popen[bytes]") -> Cpu:
    return lambda: {name: stack.cpu_s(process.pid)}


def _measure(contender: Contender, seconds: float) -> None:
    if contender.failure is not None:
        return
    try:
        for concurrency in CONCURRENCIES:
            _count(contender, f"{concurrency}", lambda n=concurrency: load.closed_loop(  # type: ignore[misc]
                contender.target, concurrency=n, seconds=seconds))  # fmt: skip
        _count(contender, "open", lambda: load.open_loop(contender.target, rate=RATE, seconds=seconds * 1.6))
    except (load.LoadError, OSError) as error:
        if contender.name.startswith("switchyard"):
            raise
        contender.failure = str(error).splitlines()[0][:160]


def _count(contender: Contender, kind: str, run: Callable[[], Result]) -> None:
    """Run, and charge the CPU time that passed to the requests answered in it."""
    cpu, began = contender.cpu(), time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - began
    used = {name: seconds - cpu[name] for name, seconds in contender.cpu().items()}
    # The warm-up's answers are not in the result, but their CPU time is: scale to the whole run.
    answered = result.rate * elapsed
    contender.results.setdefault(kind, []).append(result)
    contender.cpu_ms.setdefault(kind, []).append({name: 1000 * spent / answered for name, spent in used.items()})
    report.say(
        f"    {kind}: {result.rate:,.0f}/s, p50 {result.latency_ms(0.5):.1f} ms, p99 {result.latency_ms(0.99):.1f} ms, "
        f"client {result.busy:.0%} of a core"
    )


def _summary(contenders: list[Contender], failures: Mapping[str, str], repeats: int) -> report.Table:
    columns = ["", *[f"req/s, {n} callers" for n in CONCURRENCIES], "p50 ms", "p99 ms", "CPU ms/req"]
    rows: list[tuple[report.Cell, ...]] = []
    for one in contenders:
        if one.failure is not None:
            rows.append((one.name, f"failed: {one.failure}", *[None] * 4))
            continue
        opened = one.results["open"]
        rates = [report.spread([result.rate for result in one.results[str(n)]]) for n in CONCURRENCIES]
        rows.append((
            one.name, *rates,
            report.spread([result.latency_ms(0.5) for result in opened], 1),
            report.spread([result.latency_ms(0.99) for result in opened], 1),
            report.median([sum(spent.values()) for spent in one.cpu_ms[str(CONCURRENCIES[0])]]),
        ))  # fmt: skip
    rows += [(name, f"not measured: {why[:160]}", *[None] * 4) for name, why in failures.items()]
    busiest = max(result.busy for one in contenders for result in one.results.get("open", []))
    notes = (
        f"median (lowest–highest) of {repeats}, in turns; latency at {RATE:g} requests/s from when each was due",
        f"CPU ms/req at {CONCURRENCIES[0]} callers, every process of the contender; the open loop's client used at most "
        f"{busiest:.0%} of a core",
        AIM,
    )
    return report.Table("Echo backend, 0 ms: what the gateway costs", tuple(columns), rows, notes)


def _cpu_table(own: Contender) -> report.Table:
    kinds = {f"{n} callers": str(n) for n in CONCURRENCIES} | {f"{RATE:g}/s": "open"}
    names = list(own.cpu_ms["open"][0])
    rows: list[tuple[report.Cell, ...]] = [
        (name, *[report.median([spent[name] for spent in own.cpu_ms[kind]]) for kind in kinds.values()]) for name in names
    ]
    totals = [report.median([sum(spent.values()) for spent in own.cpu_ms[kind]]) for kind in kinds.values()]
    return report.Table("Switchyard, CPU milliseconds a job by process", ("", *kinds), [*rows, ("total", *totals)])


if __name__ == "__main__":
    main()
