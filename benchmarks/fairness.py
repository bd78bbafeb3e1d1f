"""What one tenant's flood does to another: the second one's wait in the queue, before and during it.

    python -m benchmarks.fairness [--repeats 3] [--quick] [--json FILE]

Two tenants submit jobs at fixed rates to an echo backend whose capacity is known: slots over the time of a call.
First both stay within their shares, then the first asks for ten times its own. Waits are Postgres's:
from a job's creation to the claim of its worker.
"""

import itertools
import json

from benchmarks import load, report, stack
from benchmarks.load import Target
from db import session

SLOTS, CALL_MS = 16, 200
CAPACITY = SLOTS / (CALL_MS / 1000)
SHARE = CAPACITY / 2
CONFIG = f"""\
backends:
  echo: {{runtime: echo, concurrency: {SLOTS}, max_queued: 400}}
models:
  echo: {{path: echo, backends: [echo]}}
"""
BODY = json.dumps(
    {
        "endpoint": "/v1/completions",
        "body": {"model": "echo", "prompt": "{number}", "options": {"first_token_ms": CALL_MS}},
    }
)
AIM = "aim: at ten times its share, one tenant at most doubles the other's 95th percentile"


def main() -> None:
    args = report.parser("fairness", __doc__).parse_args()
    made = report.start("fairness")
    seconds, repeats = (5.0, 1) if args.quick else (15.0, args.repeats)
    rows: list[tuple[report.Cell, ...]] = []
    waits: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with stack.running(CONFIG) as running:
        keys = {name: running.create_key(name) for name in ("greedy", "modest")}
        starts = itertools.count(0, 10**6)
        for repeat in range(repeats):
            for phase, factor in (("within its share", 1.0), ("at ten times", 10.0)):
                report.say(f"{repeat + 1}/{repeats} greedy {phase}")
                rates = {"greedy": SHARE * factor, "modest": SHARE}
                _offer(running, keys, rates, seconds, starts)
                for name, values in _waits(running).items():
                    found = (load.percentile(values, 0.5), load.percentile(values, 0.95))
                    waits.setdefault((name, phase), []).append(found)
    for (name, phase), seen in waits.items():
        rows.append((f"{name}, greedy {phase}", report.spread([p50 for p50, _ in seen], 1),
                     report.spread([p95 for _, p95 in seen], 1)))  # fmt: skip
    before, during = (waits["modest", phase] for phase in ("within its share", "at ten times"))
    ratios = [one[1] / other[1] for one, other in zip(during, before, strict=True)]
    rows.append(("modest: how many times its p95", None, report.spread(ratios, 2)))
    notes = (
        f"{SLOTS} slots, {CALL_MS} ms a call, so {CAPACITY:g} calls/s; a share is {SHARE:g}/s",
        f"median (lowest–highest) of {repeats}",
        AIM,
    )
    made.add(report.Table("Wait in the queue, ms", ("tenant", "p50", "p95"), rows, notes))
    made.save(args.json)


def _offer(
    running: stack.Stack, keys: dict[str, str], rates: dict[str, float], seconds: float, starts: "itertools.count[int]"
) -> None:
    """Both tenants at once; returns when every accepted job has ended."""
    loops = []
    for name, rate in rates.items():
        target = Target(running.port, BODY, "/v1/jobs", {"authorization": f"Bearer {keys[name]}"},
                        statuses=(b"202", b"429"))  # fmt: skip
        loops.append((target, rate, next(starts)))
    load.open_loops(loops, seconds)


def _waits(running: stack.Stack) -> dict[str, list[float]]:
    """Milliseconds each job waited, by tenant, once all have ended; and forgets them."""
    with session.connect(running.database_url, "switchyard-bench").cursor() as cursor:
        stack.wait_for_ends(cursor)
        cursor.execute("SELECT tenant, extract(epoch FROM started_at - created_at)::float8 * 1000 FROM jobs")
        waits: dict[str, list[float]] = {}
        for tenant, wait_ms in cursor.fetchall():
            waits.setdefault(tenant, []).append(wait_ms)
        cursor.execute("DELETE FROM jobs")
    return waits


if __name__ == "__main__":
    main()
