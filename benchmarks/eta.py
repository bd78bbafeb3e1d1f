"""How honest the expected time of a queued job is: what callers were told beside when their answers came.

    python -m benchmarks.eta [--quick] [--json FILE]

Calls of three lengths, whose mixture the router has to learn, arrive first below the backend's capacity and then
above it, so that a queue builds. Each job's expectation is the one in its own decision, made when it was accepted;
the time it took is Postgres's, from its creation to its end.
"""

import json

from benchmarks import load, report, stack
from benchmarks.load import Target
from db import session

SLOTS = 16
CALLS_MS = (100, 200, 400)
CAPACITY = SLOTS / (sum(CALLS_MS) / len(CALLS_MS) / 1000)
PHASES = (("below capacity", 0.7), ("above capacity", 1.3))
CONFIG = f"""\
backends:
  echo: {{runtime: echo, concurrency: {SLOTS}, max_queued: 5000}}
models:
  echo: {{path: echo, backends: [echo]}}
"""
AIM = "aim: half of the answers within p50, nine tenths within p90"


def main() -> None:
    args = report.parser("eta", __doc__).parse_args()
    made = report.start("eta")
    seconds = 8.0 if args.quick else 30.0
    rows = []
    with stack.running(CONFIG) as running:
        report.say("learning")
        _offer(running, 0.5 * CAPACITY, 8.0)
        _ended(running)
        for name, factor in PHASES:
            report.say(f"{name}, {factor * CAPACITY:.0f} calls/s for {seconds:g} s")
            _offer(running, factor * CAPACITY, seconds)
            rows.append((name, *_row(_ended(running))))
    columns = ("load", "jobs", "p50 ms told", "ms taken", "within p50, %", "p90 ms told", "within p90, %",
               "error of p50, ms", "of the time taken, %")  # fmt: skip
    notes = (f"{SLOTS} slots, calls of {', '.join(map(str, CALLS_MS))} ms; told, taken and errors are medians", AIM)
    made.add(report.Table("Expected and real time until the answer", columns, rows, notes))
    made.save(args.json)


def _offer(running: stack.Stack, rate: float, seconds: float) -> None:
    """All lengths at once, equally often."""
    loops = []
    for call_ms in CALLS_MS:
        body = {"model": "echo", "prompt": "{number}", "options": {"first_token_ms": call_ms}}
        job = json.dumps({"endpoint": "/v1/completions", "body": body})
        target = Target(running.port, job, "/v1/jobs", running.headers(), statuses=(b"202",))
        loops.append((target, rate / len(CALLS_MS), call_ms * 10**6))
    load.open_loops(loops, seconds)


def _ended(running: stack.Stack) -> list[tuple[float, float, float]]:
    """(p50 told, p90 told, taken) of each job in milliseconds, once all have ended; and forgets them."""
    with session.connect(running.database_url, "switchyard-bench").cursor() as cursor:
        stack.wait_for_ends(cursor)
        cursor.execute(
            """
            SELECT (facts ->> 'eta_p50_ms')::float8, (facts ->> 'eta_p90_ms')::float8,
                   extract(epoch FROM finished_at - created_at)::float8 * 1000
            FROM jobs, LATERAL (SELECT decision -> 'chosen' -> 'facts') one (facts) WHERE facts ? 'eta_p50_ms'
            """
        )
        found = cursor.fetchall()
        cursor.execute("DELETE FROM jobs")
    return found


def _row(jobs: list[tuple[float, float, float]]) -> tuple[report.Cell, ...]:
    errors = [abs(taken - p50) for p50, _, taken in jobs]
    shares = [100 * abs(taken - p50) / taken for p50, _, taken in jobs]
    return (
        len(jobs),
        report.median([p50 for p50, _, _ in jobs]),
        report.median([taken for _, _, taken in jobs]),
        100 * sum(taken <= p50 for p50, _, taken in jobs) / len(jobs),
        report.median([p90 for _, p90, _ in jobs]),
        100 * sum(taken <= p90 for _, p90, taken in jobs) / len(jobs),
        report.median(errors),
        report.median(shares),
    )


if __name__ == "__main__":
    main()
