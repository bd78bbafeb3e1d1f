"""What every benchmark shares: its arguments, its progress lines, its tables and its JSON file."""

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

Cell = str | float | int | None

# Into a file or a pipe a line must hold a whole row.
_console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True, slots=True)
class Table:
    """Figures as they are printed and as they are kept."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Report:
    """The tables of one benchmark."""

    name: str
    machine: dict[str, Any]
    started: float = field(default_factory=time.time)
    """Unix seconds."""
    tables: list[Table] = field(default_factory=list)

    def add(self, table: Table) -> None:
        """Keep the table and print it."""
        self.tables.append(table)
        shown = RichTable(title=table.title, title_justify="left", box=None, pad_edge=False)
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if index else "left")
        for row in table.rows:
            shown.add_row(*[text(cell) for cell in row])
        _console.print(shown)
        for note in table.notes:
            _console.print(f"  [dim]{note}[/]")
        _console.print()

    def save(self, file: Path | None) -> None:
        if file is not None:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n")


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="one short repeat: shows that it works, not how fast it is")
    made.add_argument("--repeats", type=int, default=3, help="repeats of each measurement (3); figures are medians")
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    return made


def start(name: str) -> Report:
    """A report that says what it was measured on. From here on SIGTERM ends the process as an exception would,
    so that what the benchmark has started is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return Report(name, machine())


def machine() -> dict[str, Any]:
    """What the figures depend on, other load included."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def say(line: str) -> None:
    """A line of progress, on stderr."""
    print(f"  {line}", file=sys.stderr, flush=True)


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median (lowest–highest)."""
    if len(values) == 1:
        return f"{values[0]:,.{digits}f}"
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.2f}"
    return str(cell)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
