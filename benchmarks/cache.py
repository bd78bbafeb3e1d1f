"""A cache hit against the least that FastAPI can do: one gateway process, and a bare route with the same bytes.

    python -m benchmarks.cache [--repeats 3] [--quick] [--json FILE]

A hit (`x-cache: HIT` is checked on each) reads and checks the request, verifies the key, asks Postgres
and accounts for the answer; the bare route reads nothing at all. Both run under uvicorn with the same
settings, in turns, under the same load generator.
"""

import contextlib
import json
import sys
from pathlib import Path

from benchmarks import load, peers, report, stack
from benchmarks.echo import first_answer
from benchmarks.load import Result, Target
from local import servers

BODY = json.dumps(
    {"model": "echo", "temperature": 0, "messages": [{"role": "user", "content": "What does a cache hit cost?"}]}
)
CONCURRENCY = 64
RATE = 100.0
AIM = "aim: a hit at half the bare route's rate or better"


def main() -> None:
    args = report.parser("cache", __doc__).parse_args()
    made = report.start("cache")
    seconds, repeats = (2.0, 1) if args.quick else (5.0, args.repeats)
    results: dict[str, list[Result]] = {}
    with contextlib.ExitStack() as exits:
        targets = _targets(exits)
        for repeat in range(repeats):
            for name, target in targets.items():
                report.say(f"{repeat + 1}/{repeats} {name}")
                closed = load.closed_loop(target, concurrency=CONCURRENCY, seconds=seconds)
                opened = load.open_loop(target, rate=RATE, seconds=seconds)
                results.setdefault(f"{name} closed", []).append(closed)
                results.setdefault(f"{name} open", []).append(opened)
                report.say(f"    {closed.rate:,.0f}/s, p50 {opened.latency_ms(0.5):.2f} ms")
    made.add(_summary(list(targets), results, repeats))
    made.save(args.json)


def _targets(exits: contextlib.ExitStack) -> dict[str, Target]:
    report.say("starting the stack and the bare route")
    running = exits.enter_context(stack.running(stack.ECHO))
    answer = running.home / "answer.json"
    answer.write_bytes(first_answer(running.port, running.headers(), BODY))
    port = servers.free_port(None)
    argv = [sys.executable, "-m", "benchmarks.bare", str(port), str(answer)]
    exits.enter_context(peers.process(argv, f"http://127.0.0.1:{port}/", Path(running.home / "bare.log")))
    return {
        "cache hit": Target(running.port, BODY, headers=running.headers(), expected=b"x-cache: hit"),
        "bare FastAPI route": Target(port, BODY, headers=running.headers()),
    }


def _summary(names: list[str], results: dict[str, list[Result]], repeats: int) -> report.Table:
    rows: list[tuple[report.Cell, ...]] = []
    for name in names:
        closed, opened = results[f"{name} closed"], results[f"{name} open"]
        rows.append((
            name,
            report.spread([result.rate for result in closed]),
            report.spread([result.latency_ms(0.5) for result in closed], 1),
            report.spread([result.latency_ms(0.99) for result in closed], 1),
            report.spread([result.latency_ms(0.5) for result in opened], 2),
            report.spread([result.latency_ms(0.99) for result in opened], 2),
        ))  # fmt: skip
    hit, bare = (results[f"{name} closed"] for name in names)
    shares = [100 * one.rate / other.rate for one, other in zip(hit, bare, strict=True)]
    rows.append(("hit as a share of bare, %", report.spread(shares, 1), *[None] * 4))
    columns = ("", "req/s", "p50 ms", "p99 ms", f"p50 ms at {RATE:g}/s", f"p99 ms at {RATE:g}/s")
    notes = (f"{CONCURRENCY} callers; median (lowest–highest) of {repeats}, in turns", AIM)
    return report.Table("Cache hit, one gateway process", columns, rows, notes)


if __name__ == "__main__":
    main()
