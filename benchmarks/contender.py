"""One side of a comparison: where it answers, what CPU time it uses, and what was measured of it so far."""

import http.client
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks import load, report
from benchmarks.load import Result, Target

Cpu = Callable[[], Mapping[str, float]]
"""CPU seconds used so far, by process."""


@dataclass(slots=True)
class Contender:
    """Runs are kept by kind, "64 callers" or "50/s", in the order they were made."""

    name: str
    target: Target
    cpu: Cpu
    results: dict[str, list[Result]] = field(default_factory=dict)
    cpu_ms: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """CPU milliseconds a request, by process."""

    def closed_loop(self, concurrency: int, seconds: float) -> None:
        self._run(
            f"{concurrency} callers", lambda: load.closed_loop(self.target, concurrency=concurrency, seconds=seconds)
        )

    def open_loop(self, rate: float, seconds: float) -> None:
        self._run(f"{rate:g}/s", lambda: load.open_loop(self.target, rate=rate, seconds=seconds))

    def rates(self, kind: str) -> list[float]:
        """Answers a second in each run."""
        return [result.rate for result in self.results[kind]]

    def latencies_ms(self, kind: str, share: float) -> list[float]:
        return [result.latency_ms(share) for result in self.results[kind]]

    def cpu_ms_of(self, kind: str, process: str) -> list[float]:
        return [used[process] for used in self.cpu_ms[kind]]

    def total_cpu_ms(self, kind: str) -> list[float]:
        """CPU milliseconds a request of all its processes, in each run."""
        return [sum(used.values()) for used in self.cpu_ms[kind]]

    def _run(self, kind: str, run: Callable[[], Result]) -> None:
        before, began = self.cpu(), time.perf_counter()
        result = run()
        # A closed loop's warm-up is not in its result, but its CPU time is: charge the whole run's answers.
        answered = result.rate * (time.perf_counter() - began)
        used = {name: seconds - before[name] for name, seconds in self.cpu().items()}
        self.results.setdefault(kind, []).append(result)
        self.cpu_ms.setdefault(kind, []).append({name: 1000 * seconds / answered for name, seconds in used.items()})
        report.say(
            f"    {kind}: {result.rate:,.0f}/s, p50 {result.latency_ms(0.5):.1f} ms, "
            f"p99 {result.latency_ms(0.99):.1f} ms, client {result.busy:.0%} of a core"
        )


def first_answer(target: Target) -> bytes:
    """The body of one answer to request number 0. Raises LoadError where it is not 200."""
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=load.PATIENCE_S)
    try:
        body = target.body.replace("{number}", "0" * 12)
        connection.request("POST", target.path, body, {"content-type": "application/json", **target.headers})
        answer = connection.getresponse()
        found = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise load.LoadError(f"{answer.status}: {found[:300].decode(errors='replace')}")
    return found
