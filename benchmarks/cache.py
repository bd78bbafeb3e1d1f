"""A cache hit against the least that FastAPI can do: one gateway process, and a bare route with the same bytes.

    python -m benchmarks.cache [--repeats 3] [--quick] [--json FILE]

`x-cache: HIT` is checked on each answer. The hot entry is asked for over and over, so Postgres confirms
it once a second; the ten thousand others come in turns, each so rarely that it is looked up in Postgres
each time. The bare route reads nothing at all. All run under uvicorn with the same settings, in turns,
under the same load generator.
"""

import contextlib
import dataclasses
import json
import sys

from benchmarks import load, peers, report, stack
from benchmarks.contender import Contender, first_answer
from benchmarks.load import Target
from local import servers


def _body(text: str) -> str:
    return json.dumps({"model": "echo", "temperature": 0, "messages": [{"role": "user", "content": text}]})


HOT = _body("What does a cache hit cost?")
MANY = _body("What does hit {number} cost?")
NUM_KEYS = 10_000
CONCURRENCY = 64
RATE = 100.0
AIM = "aim: a hit at half the bare route's rate or better"


def main() -> None:
    args = report.parser("cache", __doc__).parse_args()
    made = report.start("cache")
    seconds, repeats = (2.0, 1) if args.quick else (5.0, args.repeats)
    with contextlib.ExitStack() as exits:
        contenders = _contenders(exits)
        for repeat in range(repeats):
            for one in contenders:
                report.say(f"{repeat + 1}/{repeats} {one.name}")
                one.closed_loop(CONCURRENCY, seconds)
                one.open_loop(RATE, seconds)
    made.add(_summary(*contenders, repeats))
    made.save(args.json)


def _contenders(exits: contextlib.ExitStack) -> tuple[Contender, Contender, Contender]:
    report.say("starting the stack and the bare route")
    running = exits.enter_context(stack.running(stack.ECHO))
    hit = Target(running.port, HOT, headers=running.headers(), expected=b"x-cache: hit")
    answer = running.home / "answer.json"
    answer.write_bytes(first_answer(hit))
    report.say(f"filling the cache with {NUM_KEYS:,} entries")
    load.fixed_number(Target(running.port, MANY, headers=running.headers()), concurrency=64, requests=NUM_KEYS)
    many = dataclasses.replace(hit, body=MANY, num_bodies=NUM_KEYS)
    port = servers.free_port(None)
    argv = [sys.executable, "-m", "benchmarks.bare", str(port), str(answer)]
    process = exits.enter_context(peers.process(argv, f"http://127.0.0.1:{port}/", running.home / "bare.log"))
    bare = Target(port, HOT, headers=running.headers())
    return (
        Contender("hot entry", hit, running.cpu_s),
        Contender(f"{NUM_KEYS:,} entries in turns", many, running.cpu_s),
        Contender("bare FastAPI route", bare, lambda: {"bare": stack.cpu_s(process.pid)}),
    )


def _summary(hot: Contender, many: Contender, bare: Contender, repeats: int) -> report.Table:
    closed, opened = f"{CONCURRENCY} callers", f"{RATE:g}/s"
    rows: list[tuple[report.Cell, ...]] = [
        (
            one.name,
            report.spread(one.rates(closed)),
            report.spread(one.latencies_ms(closed, 0.5), 1),
            report.spread(one.latencies_ms(closed, 0.99), 1),
            report.spread(one.latencies_ms(opened, 0.5), 2),
            report.spread(one.latencies_ms(opened, 0.99), 2),
            report.spread(one.total_cpu_ms(closed), 3),
        )
        for one in (hot, many, bare)
    ]
    for hit in (hot, many):
        shares = [100 * mine / least for mine, least in zip(hit.rates(closed), bare.rates(closed), strict=True)]
        rows.append((f"{hit.name}: share of bare, %", report.spread(shares, 1), *[None] * 5))
        spent = zip(hit.cpu_ms_of(closed, "gateway0"), bare.total_cpu_ms(closed), strict=True)
        costs = [100 * least / mine for mine, least in spent]
        rows.append((f"{hit.name}: by CPU of the gateway, %", report.spread(costs, 1), *[None] * 5))
    columns = ("", "req/s", "p50 ms", "p99 ms", f"p50 ms at {opened}", f"p99 ms at {opened}", "CPU ms/req")
    notes = (f"{closed} unless said otherwise; median (lowest–highest) of {repeats}, in turns", AIM)
    return report.Table("Cache hit, one gateway process", columns, rows, notes)


if __name__ == "__main__":
    main()
