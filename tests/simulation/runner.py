"""Many schedules, on several processors: the first violation ends the run and comes with its seed."""

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field

from tests.simulation.kernel import Violation
from tests.simulation.mutants import MUTANTS
from tests.simulation.world import REAL, Parts, World

FAULTS = frozenset({
    "crash", "hang", "freeze", "stop", "session_cut", "postgres_crash", "commits_taken_back", "redis_wiped", "redis_away", "stall",
    "statement_lost", "statement_late", "answer_lost", "redis_answer_lost", "statement_outlived_its_process", "lane_down",
    "message_dropped", "message_doubled", "message_delayed", "message_reordered", "message_redelivered", "poison",
    "worker_died_by_itself", "run_stopped", "fenced_result", "submission_refused", "cancelled_as_it_ended",
    "session_timed_out", "suspect_alone", "key_replayed", "key_of_another_request",
})  # fmt: skip
TRANSITIONS = frozenset({
    "new->queued", "queued->running", "queued->cancelled", "queued->expired", "running->queued", "running->succeeded",
    "running->failed", "running->cancelled", "running->expired", "queued->succeeded", "queued->failed", "failed->queued", "expired->queued",
})  # fmt: skip
INVARIANTS = frozenset({"I1", "I2", "I5", "I6", "I7", "I17", "I18", "I19", "I20", "news", "message", "alone", "flight"})
_CHUNK = 100


@dataclass(slots=True)
class Tally:
    """What some schedules covered."""

    num_seeds: int = 0
    num_steps: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    transitions: Counter[str] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)
    violation: tuple[int, str, str] | None = None
    """Seed, invariant, what was seen."""

    def add(self, other: "Tally") -> None:
        self.num_seeds += other.num_seeds
        self.num_steps += other.num_steps
        self.faults += other.faults
        self.transitions += other.transitions
        self.checked += other.checked
        self.violation = self.violation or other.violation

    @property
    def missing(self) -> list[str]:
        """What never came up. A run that does not meet a fault says nothing about it."""
        return sorted((FAULTS - self.faults.keys()) | (TRANSITIONS - self.transitions.keys())
                      | (INVARIANTS - self.checked.keys()))  # fmt: skip


def play(start: int, num_seeds: int, num_steps: int, mutant: str | None = None) -> Tally:
    """Play schedules until one shows a violation."""
    tally = Tally()
    parts = MUTANTS[mutant] if mutant else REAL
    for seed in range(start, start + num_seeds):
        world = World(seed, parts)
        try:
            world.run(num_steps)
        except Violation as violation:
            invariant, seen = violation.args
            tally.violation = seed, invariant, seen
        tally.num_seeds += 1
        tally.num_steps += world.num_steps
        tally.faults += world.coverage
        tally.transitions += world.audit.transitions
        tally.checked += world.audit.checked
        if tally.violation is not None:
            break
    return tally


def play_all(
    start: int, num_seeds: int, num_steps: int, num_processes: int, mutant: str | None = None
) -> Iterator[Tally]:
    """The same on several processes; a tally for every hundred seeds, in the order in which they are done."""
    chunks = iter(
        [(first, min(_CHUNK, start + num_seeds - first)) for first in range(start, start + num_seeds, _CHUNK)]
    )
    if num_processes == 1:
        yield from (play(first, count, num_steps, mutant) for first, count in chunks)
        return
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        under_way: set[Future[Tally]] = set()
        while True:
            for first, count in chunks:
                under_way.add(pool.submit(play, first, count, num_steps, mutant))
                if len(under_way) > num_processes:
                    break
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def trace(seed: int, num_steps: int, parts: Parts = REAL) -> list[str]:
    """What happened in a schedule, line by line."""
    world = World(seed, parts, is_traced=True)
    try:
        world.run(num_steps)
    except Violation as violation:
        world.note("VIOLATION " + ": ".join(violation.args))
    assert world.trace is not None
    return world.trace
