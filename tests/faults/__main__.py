"""`python -m tests.faults [--long] [--seed N] [--only F12,F32]`: break things on purpose and check what was promised.

Starts a Postgres and a Valkey of its own, two gateways, two workers and two reconcilers, runs the fault rows under
traffic, one line each, and has the history checked against the ledger. Needs nothing and leaves nothing behind but
the folder with the history and the logs, and that only where something failed (or `--keep`).
"""

import argparse
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import (
    check,
    rows_clients,
    rows_ledger,
    rows_models,
    rows_processes,
    rows_resources,
    rows_servers,
    rows_waiting,
)
from tests.faults.check import Finding, Run
from tests.faults.lab import ECHO, FEATURES, REAL, Lab
from tests.faults.rows import ROWS, Row

_ALWAYS = ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I9", "I10", "I11", "I19")
# Importing them registers their rows.
_MODULES = (rows_processes, rows_resources, rows_models, rows_servers, rows_ledger, rows_waiting, rows_clients)


@dataclass(slots=True)
class Report:
    """How one row went."""

    row: Row
    verdict: str
    seconds: float = 0.0
    recoveries: list[float] = field(default_factory=list)
    jobs: int = 0

    def __str__(self) -> str:
        if not self.recoveries:
            recovery = " " * 17
        else:
            recovery = f"p50 {_percentile(self.recoveries, 50):4.1f} p99 {_percentile(self.recoveries, 99):4.1f}"
        return f"{self.row.id:<5} {self.row.family} {self.row.what:<76.76} {recovery} {self.jobs:5d} jobs {self.seconds:5.1f} s  {self.verdict}"


def main() -> int:
    args = _arguments()
    # An end by signal must not leave a stack behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    chosen = [row for row in ROWS.values() if (row.id in args.only if args.only else args.long or not row.is_long)]
    folder = Path(tempfile.mkdtemp(prefix="switchyard-faults-"))
    print(f"seed {seed}, {len(chosen)} rows, R in seconds, history and logs in {folder}\n", flush=True)
    config = REAL if any("models" in row.needs for row in chosen) and FEATURES["models"] else ECHO
    with Lab(folder, seed, is_long=args.long, rate=args.rate, config=config) as lab:
        reports = [_do(lab, row) for row in chosen]
        run = Run(lab.history.records, *lab.close_books())
    findings = check.check(run)
    demanded = {*_ALWAYS, *(name for report in reports if report.recoveries for name in report.row.invariants)}
    wrong = check.failed(findings, demanded & check.CHECKS.keys())
    _print(findings, wrong, run, lab, reports)
    bad = [report.row.id for report in reports if report.verdict != "ok"]
    if bad or wrong:
        print(f"\nFAILED: rows {', '.join(bad) or 'none'}; invariants {', '.join(wrong) or 'none'}; seed {seed}")
        return 1
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _do(lab: Lab, row: Row) -> Report:
    """One row, the healing after it, and its line."""
    missing = [name for name in row.needs if not FEATURES[name]]
    report = Report(row, f"NOT RUN: needs {', '.join(missing)}" if missing else "ok")
    if not missing:
        lab.history.row = row.id
        started, num_before = time.monotonic(), len(lab.history.records)
        try:
            report.recoveries = row.run(lab)
            worst = max(report.recoveries, default=float("inf"))
            if worst > row.within_s:
                report.verdict = f"SLOW: {worst:.1f} s of {row.within_s:.0f}"
        except Exception as error:
            report.verdict = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        report.seconds = time.monotonic() - started
        lab.clients.stop(30)
        lab.heal()
        made = {record.job_id for record in lab.history.records[num_before:] if record.job_id is not None}
        report.jobs = len(made)
    print(report, flush=True)
    return report


def _print(findings: Sequence[Finding], wrong: Sequence[str], run: Run, lab: Lab, reports: Sequence[Report]) -> None:
    print()
    for finding in findings:
        print(finding, "  <-- FAILED" if finding.invariant in wrong else "")
        for violation in finding.violations[:8]:
            print(f"       {violation}")
    accepted = run.accepted
    lost = [job_id for job_id in accepted if job_id not in run.after.jobs]
    stored = [job_id for job_id, _ in run.after.writes]
    ran_again = [report for report in reports if report.recoveries]
    resumed = {record.op for record in run.history if record.kind == "stream" and record.after}
    restarted = _restarted_streams(run)
    whole = next(finding for finding in findings if finding.invariant == "I14")
    print(
        f"\n{len(ran_again)} rows, {lab.num_kills} kill -9, {len(accepted):,} jobs promised, {len(run.after.jobs):,} in the ledger, "
        f"{len(lost)} lost, {len(stored) - len(set(stored))} stored twice"
        f"\nstreams that went on elsewhere: {len(resumed)} behind another gateway, {restarted} on another worker; "
        f"{len(whole.violations)} with a gap, a repeat or a wrong end"
    )


def _restarted_streams(run: Run) -> int:
    streamed = {record.job_id for record in run.history if record.kind == "stream" and record.job_id is not None}
    return sum(job.attempt > 1 or bool(job.outcomes) for job_id, job in run.after.jobs.items() if job_id in streamed)


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="every row, with more repetitions: about an hour")
    parser.add_argument("--seed", type=int, help="of the clients and of the random schedule")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="F12,F32", help="these rows alone")
    parser.add_argument("--rate", type=float, default=20.0, help="users a second beside each fault (20)")
    parser.add_argument("--keep", action="store_true", help="keep the history and the logs")
    args = parser.parse_args()
    for number in args.only or ():
        if number not in ROWS:
            parser.error(f"no row {number!r}: {', '.join(ROWS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
