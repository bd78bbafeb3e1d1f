"""How exactly several gateway processes keep rates: what was let through beside what a perfect limiter lets through.

    python -m benchmarks.limits [--quick] [--json FILE]

Two keys, one limited in requests and one in tokens per minute, ask for four times as much as they may, through four
gateway processes that share a port. No minute, wherever it begins, may hold more than the limit; and a limiter that
remembers every call exactly says how much could have been let through at the same times.
"""

import bisect
import json
from collections import deque
from dataclasses import dataclass

from benchmarks import load, report, stack
from benchmarks.load import Target
from db import session
from db.tenants import Limits

NUM_GATEWAYS = 4
WINDOW_S = 60.0
EXCESS = 4
MAX_TOKENS = 20
AIM = "aim: never over the limit, and at least 95 % of what a perfect limiter lets through"


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit, and how many calls a second are offered to it."""

    name: str
    limits: Limits
    limit: int
    rate: float
    weight: str
    """SQL: what a job counts for."""


RULES = (
    Rule("requests", Limits(requests_per_minute=600), 600, EXCESS * 600 / WINDOW_S, "1"),
    Rule("tokens", Limits(tokens_per_minute=12_000), 12_000, EXCESS * 12_000 / (MAX_TOKENS + 13) / WINDOW_S,
         f"prompt_tokens + {MAX_TOKENS}"),
)  # fmt: skip
BODY = json.dumps({"model": "echo", "prompt": "{number}", "max_tokens": MAX_TOKENS})


def main() -> None:
    parser = report.parser("limits", __doc__)
    args = parser.parse_args()
    made = report.start("limits")
    seconds = 75.0 if args.quick else 200.0
    with stack.running(stack.ECHO, gateways=NUM_GATEWAYS) as running:
        report.say(f"offering {EXCESS} times each limit for {seconds:g} s")
        _offer(running, seconds)
        rows = [_row(rule, running, seconds) for rule in RULES]
    columns = ("limit", "a minute", "offered", "let through", "most in any minute", "perfect", "share of perfect, %")
    notes = (f"{NUM_GATEWAYS} gateway processes behind one port, {seconds:g} s", AIM)
    made.add(report.Table("Rates kept by several processes", columns, rows, notes))
    made.save(args.json)


def _offer(running: stack.Stack, seconds: float) -> None:
    """Both keys at once."""
    loops = []
    for number, rule in enumerate(RULES):
        secret = running.create_key(rule.name, rule.limits)
        target = Target(running.port, BODY, "/v1/completions", {"authorization": f"Bearer {secret}"},
                        statuses=(b"200", b"429"))  # fmt: skip
        loops.append((target, rule.rate, number * 10**6))
    load.open_loops(loops, seconds)


def _row(rule: Rule, running: stack.Stack, seconds: float) -> tuple[report.Cell, ...]:
    with session.connect(running.database_url, "switchyard-bench").cursor() as cursor:
        cursor.execute(
            f"SELECT extract(epoch FROM created_at)::float8, {rule.weight} FROM jobs WHERE tenant = %s ORDER BY 1",
            (rule.name,),
        )
        passed = [(float(at), int(weight)) for at, weight in cursor.fetchall()]
    weight = passed[0][1]
    offered = [(passed[0][0] + number / rule.rate, weight) for number in range(round(rule.rate * seconds))]
    perfect = _perfect(offered, rule.limit)
    through = sum(weight for _, weight in passed)
    return (rule.name, rule.limit, sum(weight for _, weight in offered), through, _most(passed), perfect,
            100 * through / perfect)  # fmt: skip


def _most(passed: list[tuple[float, int]]) -> int:
    """The most that any window held, wherever it began."""
    times, sums = [at for at, _ in passed], [0]
    for _, weight in passed:
        sums.append(sums[-1] + weight)
    return max(sums[bisect.bisect_left(times, at + WINDOW_S)] - sums[number] for number, at in enumerate(times))


def _perfect(offered: list[tuple[float, int]], limit: int) -> int:
    """What a limiter lets through that remembers each call and its time."""
    held: deque[tuple[float, int]] = deque()
    through = count = 0
    for at, weight in offered:
        while held and held[0][0] <= at - WINDOW_S:
            count -= held.popleft()[1]
        if count + weight <= limit:
            held.append((at, weight))
            count += weight
            through += weight
    return through


if __name__ == "__main__":
    main()
