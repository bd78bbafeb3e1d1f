"""`python -m benchmarks [NAME ...]`: run some benchmarks, or all.

Each runs in a process of its own, one after the other, so none inherits another's memory or threads.
Figures are medians of repeats, and ratios are between things measured in turns within one run. They
depend on the machine and on what else runs on it: compare within a table, not between runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report, stack


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A module of this package that has a command line of its own."""

    about: str
    quick: tuple[str, ...] = ("--quick",)
    """What makes it short."""


BENCHMARKS: Mapping[str, Benchmark] = {
    "echo": Benchmark("durable jobs a second and added latency, beside other gateways"),
    "cache": Benchmark("a cache hit beside a bare FastAPI route"),
    "fairness": Benchmark("what one tenant's flood does to another's wait"),
    "limits": Benchmark("rates kept by four gateway processes beside a perfect limiter"),
    "eta": Benchmark("the expected time of queued jobs beside the time they took"),
    "batch": Benchmark("50,000 lines through the Batches API, and through a crash"),
    "vllm": Benchmark("vLLM through the queue beside vLLM's own server"),
    "gpt": Benchmark("the GPT backend beside Transformers", ("--repeats", "1", "--skip-serve", "--concurrency", "8")),
    "bert": Benchmark("the BERT backend beside sentence-transformers", ("--repeats", "1", "--texts", "512")),
    "startup": Benchmark("wall time of `make up`, memory of the running stack"),
}


def main() -> int:
    args = _arguments()
    results: dict[str, Any] = {"machine": report.machine(), "started": time.time(), "benchmarks": {}}
    failed = []
    for name in args.names or BENCHMARKS:
        print(f"\n{name}: {BENCHMARKS[name].about}\n", flush=True)
        found = _run(name, args.quick)
        if found is None:
            failed.append(name)
        results["benchmarks"][name] = found
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(name: str, is_quick: bool) -> Any:
    """The figures of one benchmark as it wrote them; None where it failed."""
    with tempfile.TemporaryDirectory(prefix="switchyard-bench-") as folder:
        file = Path(folder) / "figures.json"
        argv = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(file)]
        done = subprocess.run([*argv, *(BENCHMARKS[name].quick if is_quick else ())], cwd=stack.ROOT, check=False)
        return json.loads(file.read_text()) if done.returncode == 0 and file.exists() else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all without one")
    parser.add_argument("--quick", action="store_true", help="short runs: show that it works, not how fast it is")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark {name!r}: {', '.join(BENCHMARKS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
