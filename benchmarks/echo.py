"""What the gateway itself costs: durable jobs a second and added latency, with a backend that takes no time.

    python -m benchmarks.echo [--no-peers] [--peers-dir DIR] [--repeats 3] [--quick] [--json FILE]

Every request is a job: stored in Postgres, sent through the queue, run by a worker, its answer stored
and then returned (`x-cache: BYPASS` is checked on each). Beside it, in turns within the same run, other
gateways in front of an upstream that answers the same bytes at once; they store nothing.
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import load, peers, report, stack
from benchmarks.contender import Contender, first_answer
from benchmarks.load import Target
from local import servers

BODY = json.dumps(
    {"model": "echo", "messages": [{"role": "user", "content": "Question {number}: what does a gateway cost?"}]}
)
CONCURRENCIES = (64, 256)
RATE = 50.0
AIM = "aim: at least 600 jobs/s, and 12 ms at the median at 50 requests/s"

_CLOSED = [f"{concurrency} callers" for concurrency in CONCURRENCIES]
_OPEN = f"{RATE:g}/s"


def main() -> None:
    parser = report.parser("echo", __doc__)
    parser.add_argument("--no-peers", action="store_true", help="measure Switchyard alone")
    parser.add_argument("--peers-dir", type=Path, default=peers.DEFAULT_FOLDER, help="where the peers are installed")
    args = parser.parse_args()
    made = report.start("echo")
    seconds, repeats = (2.0, 1) if args.quick else (5.0, args.repeats)
    failures: dict[str, str] = {}
    """By contender: why it has no figures."""
    with contextlib.ExitStack() as exits:
        own = _own(exits)
        others = [] if args.no_peers else _peers(own[0].target, args.peers_dir, failures, exits)
        for repeat in range(repeats):
            for one in [*own, *others]:
                if one.name not in failures:
                    report.say(f"{repeat + 1}/{repeats} {one.name}")
                    _measure(one, seconds, failures if one in others else None)
    made.add(_summary([*own, *others], failures, repeats))
    made.add(_cpu_table(own[0]))
    made.save(args.json)


def _own(exits: contextlib.ExitStack) -> list[Contender]:
    """Switchyard with fsync on, as it ships, and off, to show what durability costs."""
    contenders = []
    for name, durable in (("switchyard", True), ("switchyard, fsync off", False)):
        report.say(f"starting {name}")
        running = exits.enter_context(stack.running(stack.ECHO, durable=durable))
        target = Target(running.port, BODY, headers=running.headers(), expected=b"x-cache: bypass")
        contenders.append(Contender(name, target, running.cpu_s))
    return contenders


def _peers(own: Target, folder: Path, failures: dict[str, str], exits: contextlib.ExitStack) -> list[Contender]:
    """The upstream, and every peer that can be had in front of it."""
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / "answer.json"
    answer.write_bytes(first_answer(own))
    port = servers.free_port(None)
    argv = [sys.executable, "-m", "benchmarks.upstream", str(port), str(answer)]
    upstream = exits.enter_context(peers.process(argv, f"http://127.0.0.1:{port}/", folder / "upstream.log"))
    contenders = []
    for name, starter in peers.STARTERS.items():
        report.say(f"starting {name} (the first time installs it)")
        try:
            peer = exits.enter_context(starter(folder, port))
            target = Target(peer.port, BODY, headers=peer.headers)
            first_answer(target)
        except (peers.PeerError, load.LoadError, OSError) as error:
            failures[name] = str(error)
            report.say(f"    {name}: {error}")
        else:
            contenders.append(_contender(peer.name, target, peer.process.pid))
    return [*contenders, _contender("no-op upstream itself", Target(port, BODY), upstream.pid)]


def _contender(name: str, target: Target, pid: int) -> Contender:
    return Contender(name, target, lambda: {name: stack.cpu_s(pid)})


def _measure(one: Contender, seconds: float, failures: dict[str, str] | None) -> None:
    """One repeat. A failure of ours ends the benchmark, a peer's is noted in `failures`."""
    try:
        for concurrency in CONCURRENCIES:
            one.closed_loop(concurrency, seconds)
        one.open_loop(RATE, seconds * 1.6)
    except (load.LoadError, OSError) as error:
        if failures is None:
            raise
        failures[one.name] = str(error)
        report.say(f"    {error}")


def _summary(contenders: list[Contender], failures: Mapping[str, str], repeats: int) -> report.Table:
    measured = [one for one in contenders if one.name not in failures]
    rows: list[tuple[report.Cell, ...]] = [
        (
            one.name,
            *[report.spread(one.rates(kind)) for kind in _CLOSED],
            report.spread(one.latencies_ms(_OPEN, 0.5), 1),
            report.spread(one.latencies_ms(_OPEN, 0.99), 1),
            report.spread(one.total_cpu_ms(_CLOSED[0]), 2),
        )
        for one in measured
    ]
    rows += [(name, *[None] * 5) for name in failures]
    busiest = max(result.busy for one in measured for result in one.results[_OPEN])
    columns = ("", *[f"req/s, {kind}" for kind in _CLOSED], f"p50 ms at {_OPEN}", f"p99 ms at {_OPEN}", "CPU ms/req")
    notes = (
        *[f"{name} was not measured: {' '.join(why.split())[:300]}" for name, why in failures.items()],
        f"median (lowest–highest) of {repeats}, in turns; latency counts from when a request was due",
        f"CPU of all its processes, {_CLOSED[0]}; at {_OPEN} the client used up to {busiest:.0%} of a core",
        AIM,
    )
    return report.Table("Echo backend, 0 ms: what the gateway costs", columns, rows, notes)


def _cpu_table(own: Contender) -> report.Table:
    kinds = [*_CLOSED, _OPEN]
    rows: list[tuple[report.Cell, ...]] = [
        (name, *[report.median(own.cpu_ms_of(kind, name)) for kind in kinds]) for name in own.cpu_ms[_OPEN][0]
    ]
    rows.append(("all", *[report.median(own.total_cpu_ms(kind)) for kind in kinds]))
    return report.Table("Switchyard, CPU milliseconds a job by process", ("", *kinds), rows)


if __name__ == "__main__":
    main()
