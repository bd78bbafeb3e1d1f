"""vLLM through Switchyard's queue against vLLM's own server: tokens a second and time to first token.

    python -m benchmarks.vllm [--repeats 3] [--concurrency 1 16 32] [--quick] [--json FILE]

The same model, the same engine arguments, the same prompts: streamed chats of 64 tokens each, greedy,
every prompt new so that no cache answers. On one side gateway, Postgres, Valkey and a vLLM worker; on
the other `python -m vllm.entrypoints.openai.api_server`. Both are loaded once and take turns; the idle
one's CPU time is measured, because an engine that spins while it waits would be paid for by the other.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks import load, peers, report, stack
from benchmarks.contender import Cpu, first_answer
from benchmarks.load import Result, Target
from local import servers

MODEL = "smollm2-135m-instruct"
CONTEXT = 2048
OPTIONS: Mapping[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 32, "kv_cache_memory_gib": 1, "enforce_eager": True}
"""What switchyard.yaml gives the backend; enforce_eager is the backend's default on a CPU."""
TOKENS = 64
CONCURRENCIES = (1, 16, 32)
ROUNDS = 3
"""Requests of each caller in a run."""
READY_S = 600.0

_FIRST_TOKEN = re.compile(rb'"content":\s*"[^"]')


@dataclass(slots=True)
class Side:
    """One of the two servers."""

    name: str
    target: Target
    cpu: Cpu
    runs: dict[int, list[Result]] = field(default_factory=dict)
    """By concurrency."""
    cpu_ms: dict[int, list[float]] = field(default_factory=dict)
    """CPU milliseconds a token, all processes, by concurrency."""
    idle_share: list[float] = field(default_factory=list)
    """Of one core, used while the other side was measured."""

    def tokens_per_s(self, concurrency: int) -> list[float]:
        return [run.rate * TOKENS for run in self.runs[concurrency]]

    def first_ms(self, concurrency: int) -> list[float]:
        """The median time to first token of each run."""
        return [run.first_ms(0.5) for run in self.runs[concurrency]]

    def total_cpu_s(self) -> float:
        return sum(self.cpu().values())


def main() -> None:
    parser = report.parser("vllm", __doc__)
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(CONCURRENCIES))
    args = parser.parse_args()
    made = report.start("vllm")
    rounds, repeats = (1, 1) if args.quick else (ROUNDS, args.repeats)
    with contextlib.ExitStack() as exits:
        ours, theirs = _own(exits), _server(exits)
        for side in (ours, theirs):
            _check_length(side)
        number = 1
        for repeat in range(repeats):
            for concurrency in args.concurrency:
                requests = concurrency * max(rounds, 4 if concurrency == 1 else 1)
                report.say(f"{repeat + 1}/{repeats} {concurrency} callers, {requests} requests each side")
                _run(ours, theirs, concurrency, requests, number)
                _run(theirs, ours, concurrency, requests, number)
                number += requests
    made.add(_table(ours, theirs, args.concurrency, repeats))
    made.save(args.json)


def _run(side: Side, idle: Side, concurrency: int, requests: int, start: int) -> None:
    before, own_before = idle.total_cpu_s(), side.total_cpu_s()
    result = load.fixed_number(side.target, concurrency=concurrency, requests=requests, start=start)
    idle.idle_share.append((idle.total_cpu_s() - before) / result.seconds)
    if len(result.first_latencies) != requests:
        raise load.LoadError(f"{side.name}: {requests - len(result.first_latencies)} streams without a token")
    side.runs.setdefault(concurrency, []).append(result)
    own_ms = 1000 * (side.total_cpu_s() - own_before) / (requests * TOKENS)
    side.cpu_ms.setdefault(concurrency, []).append(own_ms)
    report.say(
        f"    {side.name}: {result.rate * TOKENS:,.0f} tokens/s, first token {result.first_ms(0.5):.0f} ms, "
        f"{own_ms:.1f} CPU ms a token, the idle side {idle.idle_share[-1]:.0%}"
    )


def _own(exits: contextlib.ExitStack) -> Side:
    report.say("starting Switchyard with a vLLM worker")
    config = {
        "backends": {"vllm": {"runtime": "vllm", "concurrency": 64, "options": dict(OPTIONS)}},
        "models": {MODEL: {"path": MODEL, "backends": ["vllm"], "context_length": CONTEXT}},
    }
    running = exits.enter_context(stack.running(yaml.safe_dump(config)))
    headers = running.headers()
    target = Target(running.port, _body(), headers=headers, expected=b"x-cache: miss", first=_FIRST_TOKEN)
    return Side("switchyard", target, running.cpu_s)


def _server(exits: contextlib.ExitStack) -> Side:
    report.say("starting vLLM's own server")
    folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="switchyard-bench-")))
    port = servers.free_port(None)
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--model", str(stack.ROOT / "models" / MODEL), "--served-model-name", MODEL]
    argv += ["--dtype", str(OPTIONS["dtype"]), "--max-model-len", str(CONTEXT), "--enforce-eager"]
    argv += ["--max-num-seqs", str(OPTIONS["max_num_seqs"])]
    argv += ["--kv-cache-memory-bytes", str(OPTIONS["kv_cache_memory_gib"] * 2**30)]
    argv += ["--disable-log-stats", "--disable-uvicorn-access-log"]
    process = exits.enter_context(
        peers.process(argv, f"http://127.0.0.1:{port}/health", folder / "vllm.log", _ENVIRONMENT, READY_S)
    )
    return Side("vLLM's own server", Target(port, _body(), first=_FIRST_TOKEN), _cpu_of(process))


_ENVIRONMENT: Mapping[str, str] = {
    # What backends/vllm_backend.py sets for its engine.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def _cpu_of(process: "subprocess.Popen[bytes]") -> Cpu:
    return lambda: {"vllm": stack.cpu_s(process.pid)}


def _body(**changes: object) -> str:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "{number} is a number. Tell a story in which it matters."}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    return json.dumps(body | changes)


def _check_length(side: Side) -> None:
    """Also warms the side up."""
    plain = Target(side.target.port, _body(stream=False), headers=side.target.headers)
    usage = json.loads(first_answer(plain))["usage"]
    if usage["completion_tokens"] != TOKENS:
        raise load.LoadError(f"{side.name} generated {usage['completion_tokens']} tokens, not {TOKENS}")


def _table(ours: Side, theirs: Side, concurrencies: list[int], repeats: int) -> report.Table:
    rows: list[tuple[report.Cell, ...]] = []
    for concurrency in concurrencies:
        mine, own = ours.tokens_per_s(concurrency), theirs.tokens_per_s(concurrency)
        mine_first, own_first = ours.first_ms(concurrency), theirs.first_ms(concurrency)
        rows.append((
            str(concurrency),
            report.spread(mine),
            report.spread(own),
            report.spread([100 * a / b for a, b in zip(mine, own, strict=True)], 1),
            report.spread(mine_first),
            report.spread(own_first),
            report.spread([a - b for a, b in zip(mine_first, own_first, strict=True)]),
            report.spread(ours.cpu_ms[concurrency], 1),
            report.spread(theirs.cpu_ms[concurrency], 1),
        ))  # fmt: skip
    columns = ("callers", "tokens/s", "server", "ratio %", "first token ms", "server", "difference ms",
               "CPU ms/token", "server")  # fmt: skip
    idle = max(ours.idle_share + theirs.idle_share)
    notes = (
        f"median (lowest–highest) of {repeats}, in turns; server: vLLM's own; streams of {TOKENS} tokens, greedy",
        f"{MODEL}, {dict(OPTIONS)}",
        f"both loaded at once, both with OMP_WAIT_POLICY=passive; the idle one used at most {idle:.0%} of a core",
    )
    return report.Table("vLLM through the queue and by itself", columns, rows, notes)


if __name__ == "__main__":
    main()
