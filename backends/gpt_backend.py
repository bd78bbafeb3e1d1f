"""Any Transformers causal language model, with continuous batching by an own step loop.

`generate` hands a sequence to the engine's thread (`backends.gpt_engine`) and turns what comes back into
text. Why an own loop: docs/decisions/0002-gpt-continuous-batching.md.

Options of the backend's entry in switchyard.yaml:

dtype            auto (the checkpoint's own), float32, bfloat16 or float16.
device           auto (cuda if there is one, else cpu), cpu, cuda, cuda:1.
max_batch_size   Sequences per model in one forward pass; more wait their turn. Default 32.
prefill_tokens   Prompt tokens per step beside the running sequences; a longer prompt is read over several
                 steps. Default 256 on a CPU, 2048 elsewhere. Smaller: steadier streams, slower first tokens.
num_threads      Processor threads of a forward pass. Default: torch's own choice, one per core.
pack_weights     On a CPU, keep linear weights in oneDNN's layout. Default true.
"""

import asyncio
import contextlib
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tokenizers import Tokenizer

from backends.base import Backend, BackendDead, BackendError, Capabilities, Chunk, GenerateCall, InvalidCall
from backends.text import Detokenizer
from catalog import BackendSpec, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from backends.gpt_engine import Batch, Delta, Engine, Sequence
    from backends.gpt_grammar import Grammar, Grammars

_OPTIONS = {"dtype", "device", "max_batch_size", "prefill_tokens", "num_threads", "pack_weights"}
_CONTEXT_TOKENS = 6
"""Prompt tokens the detokeniser sees first: some tokenizers join words only in context."""


class GPTBackend(Backend):
    """Several models may be loaded; they take turns on one thread."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        tasks=frozenset({"generate"}),
        parameters=frozenset(
            {
                "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
                "repetition_penalty", "logit_bias", "logprobs", "stop_token_ids", "ignore_eos", "min_tokens", "grammar",
            }
        ),
        max_logprobs=20,
    )  # fmt: skip

    def __init__(self, spec: BackendSpec) -> None:
        super().__init__(spec)
        self._models: dict[str, _Model] = {}
        self._engine: Engine | None = None

    async def start(self) -> None:
        unknown = set(self.spec.options) - _OPTIONS
        if unknown:
            raise BackendError(
                f"backends.{self.spec.name}.options: unknown {sorted(unknown)}; see backends/gpt_backend.py"
            )
        # Read when torch is loaded, hence before the import. Threads that wait for each other by spinning
        # need a core each: with two threads on two cores that others used as well, one sequence made
        # 1.1 tokens/s spinning and 15.7 sleeping.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from backends.gpt_engine import Engine

        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[None] = loop.create_future()

        def finish(error: BaseException | None) -> None:
            if loaded.done():  # whoever awaited the start has given up
                return
            if error is None:
                loaded.set_result(None)
            else:
                loaded.set_exception(error)

        def deliver(deltas: "list[tuple[Sequence, Delta]]") -> None:
            # A closed loop has no callers left to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_deliver, deltas)

        self._engine = Engine(deliver)
        self._engine.start(self._load, lambda error: loop.call_soon_threadsafe(finish, error))
        await loaded

    async def stop(self) -> None:
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
        self._models.clear()

    def num_steps(self) -> int:
        return self._engine.num_steps if self._engine is not None else 0

    def check_health(self) -> None:
        failure = self._engine.failure if self._engine else None
        if isinstance(failure, BackendDead):
            raise BackendDead(*failure.args)

    def running(self, model: str) -> int:
        """Sequences of `model` in the batch as of its last step."""
        return self._models[model].batch.running

    async def generate(self, call: GenerateCall) -> AsyncIterator[Chunk]:
        if self._engine is None:
            raise BackendError(f"{self.spec.name} has not been started")
        self._engine.check()
        model = self._models.get(call.model)
        if model is None:
            raise InvalidCall(f"{self.spec.name} does not hold the model {call.model!r}")
        model.check(call)
        stops = model.stops(call)
        text = Detokenizer(model.tokenizer, [*call.prompt_token_ids[-_CONTEXT_TOKENS:], *call.resumed_token_ids])
        limit = model.limit(call)
        if call.resumed_token_ids and call.resumed_token_ids[-1] in stops:
            yield Chunk((), text.finish(), "stop")
        elif len(call.prompt_token_ids) + len(call.resumed_token_ids) >= limit:
            yield Chunk((), text.finish(), "length")
        else:
            inbox: asyncio.Queue[Delta] = asyncio.Queue()
            grammar = await asyncio.to_thread(model.grammar, call) if call.params.grammar is not None else None
            sequence = _sequence(call, stops, limit, grammar, inbox.put_nowait)
            self._engine.add(model.batch, sequence)
            try:
                while True:
                    chunk = _chunk(await _next(inbox), text)
                    yield chunk
                    if chunk.finish_reason is not None:
                        return
            finally:
                sequence.is_cancelled = True

    def _load(self) -> "Iterator[Batch]":
        """Load every model; runs in the engine's thread, whose thread count it sets."""
        import torch

        if threads := self.spec.options.get("num_threads"):
            torch.set_num_threads(int(threads))
        for spec in self.spec.models:
            model = self._models[spec.name] = _Model(spec, self.spec.options)
            yield model.batch


class _Model:
    """One loaded model: its batch, its tokenizer and what a call to it has to satisfy."""

    def __init__(self, spec: ModelSpec, options: Mapping[str, Any]) -> None:
        from backends.gpt_engine import Batch
        from backends.gpt_model import load

        folder = Path(spec.path)
        slots = int(options.get("max_batch_size", 32))
        runner = load(folder, slots, spec.context_length, options)
        default = 256 if runner.model.device.type == "cpu" else 2048
        self.batch = Batch(spec.name, runner, slots, int(options.get("prefill_tokens", default)))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._eos = _eos(runner.model)
        self._context_length = spec.context_length
        self._folder = folder
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()

    def stops(self, call: GenerateCall) -> frozenset[int]:
        """The token ids that end `call`."""
        return frozenset(call.params.stop_token_ids) | (frozenset() if call.params.ignore_eos else self._eos)

    def grammar(self, call: GenerateCall) -> "Grammar":
        """The call's grammar. Blocks, the first time for 0.2 s: reading the vocabulary is left to who needs it."""
        from backends.gpt_grammar import Grammars

        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(self._folder, self.batch.vocabulary, self._eos)
        assert call.params.grammar is not None
        return self._grammars.start(call.params.grammar, call.resumed_token_ids)

    def limit(self, call: GenerateCall) -> int:
        """The length, prompt included, at which `call` ends."""
        return min(self._context_length, len(call.prompt_token_ids) + call.params.max_tokens)

    def check(self, call: GenerateCall) -> None:
        """InvalidCall for what would fail in the shared pass."""
        params = call.params
        ids = {*call.prompt_token_ids, *call.resumed_token_ids, *params.logit_bias, *params.stop_token_ids}
        if not call.prompt_token_ids:
            raise InvalidCall("the prompt is empty")
        if len(call.prompt_token_ids) > self._context_length:
            raise InvalidCall(f"the prompt has more than {self._context_length} tokens")
        if min(ids) < 0 or max(ids) >= self.batch.vocabulary:
            raise InvalidCall(f"token ids must be below {self.batch.vocabulary}")
        if params.logprobs is not None and not 0 <= params.logprobs <= GPTBackend.capabilities.max_logprobs:
            raise InvalidCall(f"logprobs must be at most {GPTBackend.capabilities.max_logprobs}")
        if params.temperature < 0 or params.repetition_penalty <= 0:
            raise InvalidCall("temperature must not be negative, repetition_penalty must be positive")


def _sequence(call: GenerateCall, stops: frozenset[int], limit: int, grammar: "Grammar | None",
              deliver: "Callable[[Delta], None]") -> "Sequence":  # fmt: skip
    from backends.gpt_engine import Sequence
    from backends.sampling import Sampler

    seed = call.params.seed if call.params.seed is not None else secrets.randbits(64)
    sampler = Sampler(call.params, seed, stops, call.prompt_token_ids, call.resumed_token_ids)
    ids = [*call.prompt_token_ids, *call.resumed_token_ids]
    return Sequence(call, sampler, stops, ids, limit, deliver, grammar)


def _deliver(deltas: "list[tuple[Sequence, Delta]]") -> None:
    for sequence, delta in deltas:
        sequence.deliver(delta)


async def _next(inbox: "asyncio.Queue[Delta]") -> "list[Delta]":
    """What has arrived, at least one piece: a reader slower than the model gets fewer, larger chunks."""
    deltas = [await inbox.get()]
    while not inbox.empty():
        deltas.append(inbox.get_nowait())
    return deltas


def _chunk(deltas: "list[Delta]", text: Detokenizer) -> Chunk:
    last = deltas[-1]
    if last.error is not None:
        raise type(last.error)(*last.error.args)
    tokens = tuple(token for delta in deltas for token in delta.token_ids)
    added = text.push(tokens[:-1] if last.finish_reason == "stop" else tokens)
    if last.finish_reason is not None:
        added += text.finish()
    logprobs = tuple(logprob for delta in deltas for logprob in delta.logprobs)
    return Chunk(tokens, added, last.finish_reason, logprobs)


def _eos(model: "PreTrainedModel") -> frozenset[int]:
    """The end-of-sequence ids of the generation configuration, or else of the model's."""
    for config in (model.generation_config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
