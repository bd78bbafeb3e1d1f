"""`python -m tests.simulation`: schedules of crashes, losses and hangs through the core, in simulated time.

Exit status 1 with the seed and the trace of a schedule that broke an invariant; 2 where a fault, a transition
or an invariant never came up.
"""

import argparse
import sys
import time

from tests.simulation.mutants import MUTANTS
from tests.simulation.runner import Tally, play_all, trace
from tests.simulation.world import REAL


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="schedules to play")
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--steps", type=int, default=200, help="steps of a schedule while faults last")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="break one rule of the core first")
    parser.add_argument("--trace", action="store_true", help="print what happens in the first schedule, and no more")
    options = parser.parse_args()
    parts = MUTANTS[options.mutant] if options.mutant else REAL
    if options.trace:
        print("\n".join(trace(options.start, options.steps, parts)))
        return 0
    total, started = Tally(), time.monotonic()
    for tally in play_all(options.start, options.seeds, options.steps, options.processes, options.mutant):
        total.add(tally)
        rate = total.num_seeds / (time.monotonic() - started)
        if sys.stderr.isatty():
            print(f"\r{total.num_seeds:,} schedules, {rate:,.0f}/s", end="", file=sys.stderr, flush=True)
        if total.violation is not None:
            break
    took_s = time.monotonic() - started
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if total.violation is not None:
        seed, invariant, seen = total.violation
        print("\n".join(trace(seed, options.steps, parts)))
        print(f"\n{invariant} does not hold in seed {seed} (after {total.num_seeds:,} schedules): {seen}")
        return 1
    for title, counts in (("faults", total.faults), ("transitions", total.transitions), ("checks", total.checked)):
        print(f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())))
    print(f"{total.num_seeds:,} schedules, {total.num_steps:,} steps, no violation; {took_s:.1f} s, "
          f"{total.num_seeds / took_s:,.0f} schedules/s, {total.num_steps / took_s:,.0f} steps/s")  # fmt: skip
    if total.missing:
        print("never came up: " + ", ".join(total.missing))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
