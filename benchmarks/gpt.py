"""Generated tokens per second of the GPT backend, beside what Transformers itself offers.

    python -m benchmarks.gpt [--skip-serve] [--dtype bfloat16] [--num-threads 2] [--repeats 3] [--json FILE]

N chat prompts of different lengths ask for 64 tokens each, all at once, greedily. The others: `generate` on
one padded batch of the same prompts, which nobody can join or leave, and `transformers serve
--continuous-batching` over HTTP on the loopback. They take turns within one run and each figure is the median
of its repeats, because a shared machine's speed drifts by more than the difference. Tokens per CPU second
(the server's own processes for `serve`) say the same where other processes hold the cores.

All sides run with OMP_WAIT_POLICY=PASSIVE, as the backend sets it, unless the environment says otherwise.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

import torch
import transformers

import catalog
import settings
from backends.base import GenerateCall, SamplingParams
from backends.gpt_backend import GPTBackend

_TOKENS = 64
_TOPICS = ("a lighthouse", "the first railway across a continent", "bees", "how bread rises", "an old map", "tides")
_DETAILS = ("", " for children", " in the style of a letter that an uncle sends to his niece who lives far away")


@dataclass(frozen=True, slots=True)
class Peer:
    """One contestant: answers prompts all at once and says how many tokens it made."""

    name: str
    run: Callable[[list[str]], Awaitable[int]]
    cpu_seconds: Callable[[], float]


@dataclass(slots=True)
class Row:
    """One contestant at one concurrency, per repeat."""

    peer: str
    concurrency: int
    tokens_per_s: list[float] = field(default_factory=list)
    tokens_per_cpu_s: list[float] = field(default_factory=list)


def make_prompts(count: int) -> list[str]:
    """Deterministic requests for long answers."""
    return [
        f"Write a long story, number {index}, about {_TOPICS[index % 6]}{_DETAILS[index % 3]}."
        for index in range(count)
    ]


async def compare(peers: list[Peer], concurrency: int, repeats: int) -> list[Row]:
    """Every peer once per repeat, in turns, after one round that is not counted."""
    prompts = make_prompts(concurrency)
    rows = [Row(peer.name, concurrency) for peer in peers]
    for peer in peers:
        await peer.run(prompts[: min(2, concurrency)])
    for _ in range(repeats):
        for peer, row in zip(peers, rows, strict=True):
            cpu, start = peer.cpu_seconds(), time.perf_counter()
            tokens = await peer.run(prompts)
            row.tokens_per_s.append(tokens / (time.perf_counter() - start))
            row.tokens_per_cpu_s.append(tokens / (peer.cpu_seconds() - cpu))
    return rows


async def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.num_threads)
    machine = {
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "num_threads": args.num_threads,
        "dtype": args.dtype,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "load_before": round(os.getloadavg()[0], 1),
        "repeats": args.repeats,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    rows: list[Row] = []
    async with contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(_backend(args)), _generate(args)]
        if (missing := _missing_for_serve()) and not args.skip_serve:
            print(f"skipping transformers serve: {', '.join(missing)} not installed")
        elif not args.skip_serve:
            peers.append(await stack.enter_async_context(_serve(args)))
        _print_head(peers)
        for concurrency in args.concurrency:
            measured = await compare(peers, concurrency, args.repeats)
            _print_row(measured)
            rows += measured
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The GPT backend against Transformers' own generation.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="folder, under the models folder or absolute")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip-serve", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.folder = settings.load().models_dir.absolute() / args.model
    return args


def _print_head(peers: list[Peer]) -> None:
    names = [peer.name for peer in peers]
    ratios = [f"backend / {name}" for name in names[1:]]
    cells = ["concurrency", *(f"{name} tok/s" for name in names), *ratios, *(f"{ratio}, CPU s" for ratio in ratios)]
    print("| " + " | ".join(cells) + " |\n| " + " | ".join(["---:"] * len(cells)) + " |", flush=True)


def _print_row(rows: list[Row]) -> None:
    ours, others = rows[0], rows[1:]
    cells = [str(ours.concurrency), *(f"{statistics.median(row.tokens_per_s):.1f}" for row in rows)]
    cells += [_ratio(ours.tokens_per_s, row.tokens_per_s) for row in others]
    cells += [_ratio(ours.tokens_per_cpu_s, row.tokens_per_cpu_s) for row in others]
    print("| " + " | ".join(cells) + " |", flush=True)


def _ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the ratios of the repeats: both sides of each were measured next to each other."""
    return f"{statistics.median(our / their for our, their in zip(ours, theirs, strict=True)):.2f}"


@contextlib.asynccontextmanager
async def _backend(args: argparse.Namespace) -> AsyncIterator[Peer]:
    config = {
        "backends": {
            "gpt": {
                "runtime": "gpt",
                "options": {"dtype": args.dtype, "device": "cpu", "num_threads": args.num_threads},
            }
        },
        "models": {"model": {"path": str(args.folder), "backends": ["gpt"]}},
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "switchyard.yaml"
        file.write_text(yaml.safe_dump(config))
        backend = GPTBackend(catalog.load(file, args.folder.parent).backends["gpt"])
    await backend.start()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    params = SamplingParams(max_tokens=_TOKENS, temperature=0, ignore_eos=True)

    async def one(index: int, prompt: str) -> int:
        call = GenerateCall(str(index), "model", _chat_ids(tokenizer, prompt), params)
        return sum([len(chunk.token_ids) async for chunk in backend.generate(call)])

    async def run(prompts: list[str]) -> int:
        return sum(await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts))))

    yield Peer("backend", run, time.process_time)
    await backend.stop()


def _generate(args: argparse.Namespace) -> Peer:
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=args.dtype).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder, padding_side="left")

    async def run(prompts: list[str]) -> int:
        batch = tokenizer.pad({"input_ids": [_chat_ids(tokenizer, prompt) for prompt in prompts]}, return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, do_sample=False)
        return len(prompts) * int(output.shape[1] - batch["input_ids"].shape[1])

    return Peer("generate", run, time.process_time)


def _chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def _missing_for_serve() -> list[str]:
    return [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if importlib.util.find_spec(name) is None]


@contextlib.asynccontextmanager
async def _serve(args: argparse.Namespace) -> AsyncIterator[Peer]:
    """Transformers' own server. An end-of-sequence token ends its answers; the tokens it made are counted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--continuous-batching", "--device", "cpu", "--dtype", args.dtype, "--attn-implementation", "sdpa"]
    # Unbounded, its cache takes most of the machine's memory.
    flags += ["--cb-num-blocks", "512", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(args.folder)]
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *command,
            *("--host", "127.0.0.1", "--port", str(port), *flags),
            env={**os.environ, "OMP_NUM_THREADS": str(args.num_threads), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
        )
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                await _until_ready(client, process)
                yield Peer("serve", lambda prompts: _ask(client, args.folder, prompts), _cpu_of(process.pid))
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), 30)


async def _until_ready(client: httpx.AsyncClient, process: asyncio.subprocess.Process) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.returncode is not None:
            raise RuntimeError(f"transformers serve ended with status {process.returncode}")
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/health")).is_success:
                return
        await asyncio.sleep(0.5)
    raise TimeoutError("transformers serve did not become ready")


async def _ask(client: httpx.AsyncClient, folder: Path, prompts: list[str]) -> int:
    async def one(prompt: str) -> int:
        body = {
            "model": str(folder),
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": _TOKENS,
            "temperature": 0.0,
            "stream": False,
        }
        answer = await client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    return sum(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def _cpu_of(pid: int) -> Callable[[], float]:
    process = psutil.Process(pid)

    def seconds() -> float:
        family = [process, *process.children(recursive=True)]
        return sum(times.user + times.system for times in (member.cpu_times() for member in family))

    return seconds


if __name__ == "__main__":
    asyncio.run(main())
