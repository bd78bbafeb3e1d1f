"""The register of fault rows. A row breaks something under traffic and says how long the recovery took.

A row fails by raising, by taking longer to recover than `within_s`, or through the invariants that are checked over
the whole run. Bounds are those of the design, shrunk with the test profile's lease (4 s), heartbeat and sweep.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.lab import Lab

Fault = Callable[[Lab], list[float]]
"""Does one row; the seconds that each recovery took."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the fault matrix."""

    id: str
    what: str
    invariants: tuple[str, ...]
    run: Fault
    within_s: float
    """The slowest recovery that is still in order."""
    needs: tuple[str, ...] = ()
    is_long: bool = False
    """Left out of a short run."""

    @property
    def family(self) -> str:
        """A to G: API, worker, Redis, Postgres, network, clocks and delivery, clients."""
        number = int("".join(filter(str.isdigit, self.id)))
        firsts = ((1, "A"), (10, "B"), (30, "C"), (50, "D"), (65, "E"), (70, "F"), (85, "G"))
        return max(pair for pair in firsts if pair[0] <= number)[1]


ROWS: dict[str, Row] = {}
"""By id, in the order in which they are run."""


def row(number: str, what: str, invariants: str, *, within_s: float, needs: str = "",
        is_long: bool = False) -> Callable[[Fault], Fault]:  # fmt: skip
    """Register a function as that row."""

    def register(run: Fault) -> Fault:
        assert number not in ROWS, number
        ROWS[number] = Row(number, what, tuple(invariants.split()), run, within_s, tuple(needs.split()), is_long)
        return run

    return register
