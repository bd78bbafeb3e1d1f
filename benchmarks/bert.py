"""Embedding throughput of the encoder backend against sentence-transformers' offline `encode`.

    python -m benchmarks.bert [--dtype float32] [--num-threads 2] [--repeats 3] [--json FILE]

Both sides start from texts, so both pay for tokenising; the backend then takes them as jobs, `encode` as one
list, which is the easier way to have them. The two alternate within one run and each figure is the median of
its repeats, because a shared machine's speed drifts by more than the difference. `--clock cpu` counts the
process's CPU seconds and not the wall's: use it with `--num-threads 1` where other processes hold the cores.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from sentence_transformers import SentenceTransformer

import catalog
import settings
from backends.base import EncodeCall
from backends.bert_backend import BERTBackend

_BATCH_SIZES = (16, 32, 64, 128, 256)
_STARTS = ("re", "un", "over", "under", "inter", "trans", "out", "fore", "pre", "sub")
_ROOTS = ("port", "form", "pay", "mark", "light", "count", "view", "act", "press", "line", "sign", "cover", "place")
_ENDS = ("ing", "ed", "er", "able", "ment", "ion", "ly", "ness", "s")
_COMMON = ("the", "a", "of", "to", "and", "in", "is", "that", "it", "for", "on", "with", "as", "was", "at", "by")

_Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Row:
    """Texts per second of one workload, and the same as a share of the best `encode`."""

    workload: str
    backend: float
    encode: float
    encode_batch_size: int
    ratio: float
    ratios: list[float]
    """Of each repeat."""
    forward_passes: int


@dataclass(frozen=True, slots=True)
class Peer:
    """Both sides and the texts they get."""

    backend: BERTBackend
    encoder: Any
    texts: list[str]

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.encoder.tokenizer(texts, truncation=True, max_length=256)["input_ids"]
        return ids


def make_texts(count: int) -> list[str]:
    """Deterministic texts whose lengths spread as those of search queries and short passages do."""
    rng = random.Random(0)
    words = [start + root + end for start in _STARTS for root in _ROOTS for end in _ENDS]

    def text() -> str:
        length = min(200, max(2, round(rng.lognormvariate(2.7, 0.6))))
        return " ".join(rng.choice(_COMMON if rng.random() < 0.6 else words) for _ in range(length))

    return [text() for _ in range(count)]


async def one_text_jobs(peer: Peer, concurrency: int) -> None:
    """Every text a job of its own, `concurrency` of them in flight, each tokenised when it is sent."""
    rest = iter(enumerate(peer.texts))

    async def client() -> None:
        for number, text in rest:
            await peer.backend.embed(EncodeCall(str(number), "encoder", peer.token_ids([text])))

    await asyncio.gather(*(client() for _ in range(concurrency)))


async def large_jobs(peer: Peer, size: int) -> None:
    """All at once: jobs of `size` texts."""
    parts = [peer.texts[start : start + size] for start in range(0, len(peer.texts), size)]
    calls = [EncodeCall(str(number), "encoder", peer.token_ids(part)) for number, part in enumerate(parts)]
    await asyncio.gather(*(peer.backend.embed(call) for call in calls))


async def compare(name: str, run: Callable[[Peer], Awaitable[None]], peer: Peer, repeats: int, clock: _Clock) -> Row:
    """Alternate the two sides; `encode` is taken at the batch size that is best over all repeats."""
    ours: list[float] = []
    theirs: dict[int, list[float]] = {size: [] for size in _BATCH_SIZES}
    passes = 0
    for _ in range(repeats):
        before, start = peer.backend.num_forward_passes, clock()
        await run(peer)
        ours.append(len(peer.texts) / (clock() - start))
        passes = peer.backend.num_forward_passes - before
        for size in _BATCH_SIZES:
            start = clock()
            peer.encoder.encode(peer.texts, batch_size=size, show_progress_bar=False)
            theirs[size].append(len(peer.texts) / (clock() - start))
    best = max(_BATCH_SIZES, key=lambda size: statistics.median(theirs[size]))
    ratios = [our / their for our, their in zip(ours, theirs[best], strict=True)]
    encode = statistics.median(theirs[best])
    return Row(name, statistics.median(ours), encode, best, statistics.median(ratios), ratios, passes)


async def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    report: dict[str, Any] = {"clock": args.clock, "num_threads": torch.get_num_threads(), "texts": args.texts}
    print(f"{args.texts} texts, {torch.get_num_threads()} threads, {args.clock} seconds, median of {args.repeats}")
    print("| dtype | jobs | backend texts/s | encode texts/s (batch size) | ratio | passes |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for dtype in args.dtype:
        peer = await _start(args, dtype)
        report["tokens"] = _token_statistics(peer)
        rows: list[Row] = []
        for name, run in _workloads(args).items():
            row = await compare(name, run, peer, args.repeats, clock)
            rows.append(row)
            print(
                f"| {dtype} | {row.workload} | {row.backend:.0f} | {row.encode:.0f} ({row.encode_batch_size}) "
                f"| {row.ratio:.2f} | {row.forward_passes} |",
                flush=True,
            )
        await peer.backend.stop()
        report[dtype] = [asdict(row) for row in rows]
    print(f"tokens per text: {report['tokens']}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The encoder backend against sentence-transformers' encode.")
    parser.add_argument("--model", default="all-minilm-l6-v2", help="folder, under the models folder or absolute")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--texts", type=int, default=2048)
    parser.add_argument("--concurrency", type=int, default=256, help="one-text jobs in flight")
    parser.add_argument("--job-size", type=int, default=256, help="texts of a large job")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=0)
    parser.add_argument("--max-batch-tokens", type=int, default=None)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _workloads(args: argparse.Namespace) -> dict[str, Callable[[Peer], Awaitable[None]]]:
    return {
        f"{args.texts} of 1, {args.concurrency} in flight": partial(one_text_jobs, concurrency=args.concurrency),
        f"{-(-args.texts // args.job_size)} of {args.job_size}": partial(large_jobs, size=args.job_size),
    }


async def _start(args: argparse.Namespace, dtype: str) -> Peer:
    folder = settings.load().models_dir.absolute() / args.model
    options = {"dtype": dtype, "device": "cpu", "num_threads": args.num_threads}
    if args.max_batch_tokens:
        options["max_batch_tokens"] = args.max_batch_tokens
    config = {
        "backends": {"bert": {"runtime": "bert", "options": options}},
        "models": {"encoder": {"path": str(folder), "backends": ["bert"]}},
    }
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "switchyard.yaml"
        file.write_text(yaml.safe_dump(config))
        backend = BERTBackend(catalog.load(file, folder.parent).backends["bert"])
    await backend.start()
    encoder = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    peer = Peer(backend, encoder, make_texts(args.texts))
    encoder.encode(peer.texts[:64])
    return peer


def _token_statistics(peer: Peer) -> dict[str, int]:
    lengths = [len(ids) for ids in peer.token_ids(peer.texts)]
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99]).astype(int).tolist()
    return {"p50": p50, "p90": p90, "p99": p99, "max": max(lengths), "total": sum(lengths)}


if __name__ == "__main__":
    asyncio.run(main())
