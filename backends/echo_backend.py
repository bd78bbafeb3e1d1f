"""Echo: a real backend without a model. Its output is its prompt, as slow and as faulty as asked.

Token ids are the bytes of the prompt's UTF-8 text. `options` of a call, all optional:

- `first_token_ms`, `token_ms`: delays before the first token and between tokens (default 0).
- `num_tokens`: repeat or cut the prompt to this many tokens (default: the prompt once).
- `fail`: "error" fails the attempt, "invalid" refuses the call, "dead" ends the worker's backend,
  "exit" kills the process, "hang" never goes on, each after the prompt's tokens so far reached
  `fail_after` (default 0).
"""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from backends.base import (
    Backend,
    BackendDead,
    BackendError,
    Capabilities,
    Chunk,
    EncodeCall,
    FinishReason,
    GenerateCall,
    InvalidCall,
)

if TYPE_CHECKING:
    import numpy as np

_DIMENSIONS = 16
_LABELS = 2


class EchoBackend(Backend):
    """Deterministic, and fast enough that what is measured with it is everything else."""

    capabilities = Capabilities(
        tasks=frozenset({"generate", "embed", "classify", "rerank"}),
        parameters=frozenset({"temperature", "top_p", "top_k", "seed", "stop_token_ids", "ignore_eos"}),
    )
    _is_dead = False
    _is_hung = False

    async def start(self) -> None:
        return

    async def stop(self) -> None:
        return

    def check_health(self) -> None:
        if self._is_dead:
            raise BackendDead("echo was told to die")

    def num_steps(self) -> int:
        return 0 if self._is_hung else time.monotonic_ns()

    async def generate(self, call: GenerateCall) -> AsyncIterator[Chunk]:
        tokens = self._tokens(call)
        reason: FinishReason = "length" if len(tokens) >= call.params.max_tokens else "stop"
        tokens = tokens[: call.params.max_tokens]
        fails_at = int(call.options.get("fail_after", 0)) if call.options.get("fail") else -1
        await _sleep_ms(call.options.get("first_token_ms", 0))
        delay = float(call.options.get("token_ms", 0))
        start = len(call.resumed_token_ids)
        if not delay and fails_at < 0:
            yield Chunk(tuple(tokens[start:]), _text(tokens, start, len(tokens)), reason)
            return
        for position in range(start, len(tokens)):
            if position == fails_at:
                await self._fail(str(call.options["fail"]))
            is_last = position + 1 == len(tokens)
            text = _text(tokens, position, position + 1)
            yield Chunk((tokens[position],), text, reason if is_last else None)
            if not is_last:
                await _sleep_ms(delay)
        if start >= len(tokens):
            yield Chunk((), "", reason)

    async def embed(self, call: EncodeCall) -> "np.ndarray":
        import numpy as np

        await self._encode(call)
        vectors = np.stack([_vector(tokens) for tokens in call.inputs])[:, : call.dimensions]
        unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit.astype(np.float32)

    async def classify(self, call: EncodeCall) -> "np.ndarray":
        import numpy as np

        await self._encode(call)
        scores = np.stack([np.abs(_vector(tokens)[:_LABELS]) + 0.01 for tokens in call.inputs])
        shares: np.ndarray = scores / scores.sum(axis=1, keepdims=True)
        return shares.astype(np.float32)

    async def rerank(self, call: EncodeCall) -> "np.ndarray":
        """The share of the query's bytes that the document has."""
        import numpy as np

        await self._encode(call)
        query, *documents = [set(tokens) for tokens in call.inputs]
        return np.array([len(query & document) / max(len(query), 1) for document in documents], dtype=np.float32)

    def _tokens(self, call: GenerateCall) -> list[int]:
        prompt = call.prompt_token_ids
        wanted = int(call.options.get("num_tokens", len(prompt)))
        repeats = -(-wanted // max(len(prompt), 1))
        return (prompt * repeats)[:wanted]

    async def _fail(self, how: str) -> None:
        if how == "exit":
            os._exit(1)
        if how == "hang":
            self._is_hung = True
            await asyncio.Event().wait()
        if how == "invalid":
            raise InvalidCall("echo was told to refuse")
        if how == "dead":
            self._is_dead = True
            raise BackendDead("echo was told to die")
        raise BackendError("echo was told to fail")

    async def _encode(self, call: EncodeCall) -> None:
        await _sleep_ms(call.options.get("first_token_ms", 0))
        if call.options.get("fail"):
            await self._fail(str(call.options["fail"]))


async def _sleep_ms(delay: str | int | float) -> None:
    if float(delay) > 0:
        await asyncio.sleep(float(delay) / 1000)


def _text(tokens: list[int], start: int, end: int) -> str:
    """What the tokens from `start` to `end` add: a character belongs to the token of its last byte."""
    whole = bytes(tokens[:end])
    is_end = end == len(tokens)
    after = whole.decode("utf-8", "replace" if is_end else "ignore")
    if start == 0:
        return after
    return after[len(whole[:start].decode("utf-8", "ignore")) :]


def _vector(tokens: list[int]) -> "np.ndarray":
    import numpy as np

    digest = hashlib.shake_128(bytes(tokens)).digest(2 * _DIMENSIONS)
    numbers: np.ndarray = np.frombuffer(digest, dtype=np.uint16).astype(np.float64)
    return numbers / 32768 - 1
