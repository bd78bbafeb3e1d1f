"""The batch loop of the GPT backend: which sequences compute which tokens in the next forward pass.

One thread steps every model in turn. Between two steps sequences join, leave or are cancelled; within a
step each runnable sequence gives its one next token, and what is left of the prefill budget goes to the
prompts that wait, oldest first. Results of a step reach the asyncio loop in one call.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from backends.base import BackendDead, BackendError, FinishReason, GenerateCall, InvalidCall, TokenLogprob
from backends.gpt_grammar import Grammar
from backends.gpt_model import Piece, Runner
from backends.sampling import Sampler, sample

_log = logging.getLogger(__name__)

_FAILURES_UNTIL_DEAD = 3
"""Steps in a row that nobody survived."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What a step, or for a call that does not stream all steps, added to a sequence."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: BackendError | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """One call inside the engine. Only `is_cancelled` is written from outside its thread."""

    call: GenerateCall
    sampler: Sampler
    stops: frozenset[int]
    ids: list[int]
    """Prompt, resumed and generated tokens."""
    limit: int
    """Length of `ids` at which it ends."""
    deliver: Callable[[Delta], None]
    """Called on the asyncio loop."""
    grammar: Grammar | None = None
    is_cancelled: bool = False
    slot: int = -1
    computed: int = 0
    """How many of `ids` are in the cache."""
    is_spoiled: bool = False
    """Its slot may hold values that are not numbers."""
    unsent: list[int] = field(default_factory=list)
    unsent_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return len(self.ids) - self.computed

    def accept(self, token: int, logprob: TokenLogprob | None) -> Delta | None:
        """Append a token; what to tell the caller now, if anything."""
        self.ids.append(token)
        self.sampler.accept(token)
        if self.grammar is not None:
            self.grammar.accept(token)
        self.unsent.append(token)
        if logprob is not None:
            self.unsent_logprobs.append(logprob)
        reason: FinishReason | None = None
        if token in self.stops:
            reason = "stop"
        elif len(self.ids) >= self.limit:
            reason = "length"
        if reason is None and not self.call.is_streaming:
            return None
        delta = Delta(tuple(self.unsent), tuple(self.unsent_logprobs), reason)
        self.unsent.clear()
        self.unsent_logprobs.clear()
        return delta


class Batch:
    """The sequences of one model. Belongs to the engine's thread, but for `add` and the counts."""

    def __init__(self, name: str, runner: Runner, slots: int, prefill_tokens: int) -> None:
        self.name = name
        self.vocabulary = int(runner.model.config.get_text_config().vocab_size)
        self._runner = runner
        self._slots = slots
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        """Ordered by slot, slots 0..n-1. All but the last need exactly one more token computed."""
        self._failures = 0

    @property
    def running(self) -> int:
        """Sequences in the batch as of the last step."""
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        return not self._running and not self._waiting

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def step(self) -> list[tuple[Sequence, Delta]]:
        """One forward pass. Raises BackendDead when passes keep failing."""
        self._remove({sequence for sequence in self._running if sequence.is_cancelled})
        pieces = self._plan()
        if not pieces:
            return []
        deltas = self._compute(pieces)
        self._remove({sequence for sequence, delta in deltas if delta.finish_reason or delta.error})
        return deltas

    def fail_all(self, error: BackendError) -> list[tuple[Sequence, Delta]]:
        """Empty the batch; every sequence ends with `error`."""
        sequences = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        return [(sequence, Delta(error=error)) for sequence in sequences]

    def _plan(self) -> list[Piece]:
        pieces = []
        budget = self._prefill_tokens
        for sequence in self._running:
            count = 1 if sequence.pending == 1 else min(sequence.pending, budget)
            budget -= count if count > 1 else 0
            pieces.append(_piece(sequence, count))
        while budget > 0 and self._waiting and len(self._running) < self._slots:
            sequence = self._waiting.popleft()
            if sequence.is_cancelled:
                continue
            sequence.slot = len(self._running)
            self._running.append(sequence)
            count = min(sequence.pending, budget)
            budget -= count
            pieces.append(_piece(sequence, count))
        return pieces

    def _compute(self, pieces: list[Piece]) -> list[tuple[Sequence, Delta]]:
        deltas = self._survive(pieces)
        failed = sum(delta.error is not None and not isinstance(delta.error, InvalidCall) for _, delta in deltas)
        self._failures = self._failures + 1 if failed == len(pieces) else 0
        if self._failures >= _FAILURES_UNTIL_DEAD:
            raise BackendDead(f"{self.name}: {self._failures} forward passes in a row failed")
        return deltas

    def _survive(self, pieces: list[Piece]) -> list[tuple[Sequence, Delta]]:
        """Forward and sample. When a shared pass fails, the sequences that only decode go on without the
        others, and each of the others is tried alone: one prompt too large for the memory fails one call."""
        try:
            return self._pass(pieces)
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
                raise BackendDead(f"{self.name}: the accelerator failed: {error}") from error
            if len(pieces) == 1:
                _log.exception("a sequence of %s failed", self.name)
                return [self._failed(pieces[0], f"{type(error).__name__} in the forward pass")]
            _log.warning("a pass of %s over %d sequences failed: %r", self.name, len(pieces), error)
        singles = [piece for piece in pieces if len(piece.tokens) == 1]
        if len(singles) in (0, len(pieces)):
            return [delta for piece in pieces for delta in self._survive([piece])]
        chunks = [piece for piece in pieces if len(piece.tokens) > 1]
        return self._survive(singles) + [delta for piece in chunks for delta in self._survive([piece])]

    def _failed(self, piece: Piece, message: str) -> tuple[Sequence, Delta]:
        sequence = self._running[piece.slot]
        sequence.is_spoiled = True
        return sequence, Delta(error=BackendError(message))

    def _pass(self, pieces: list[Piece]) -> list[tuple[Sequence, Delta]]:
        self._runner.reserve(max(piece.end for piece in pieces))
        logits = self._runner.forward(pieces)
        sequences = [self._running[piece.slot] for piece in pieces]
        is_sound = torch.isfinite(logits.amax(-1)).tolist()
        deltas = [
            self._failed(piece, "the model computed values that are not numbers")
            for piece, is_good in zip(pieces, is_sound, strict=True)
            if not is_good
        ]
        ready = [row for row, piece in enumerate(pieces) if is_sound[row] and piece.end == len(sequences[row].ids)]
        for row in [row for row in ready if sequences[row].grammar is not None]:
            if (failed := _constrained(sequences[row], logits[row])) is not None:
                deltas.append((sequences[row], failed))
                ready.remove(row)
        if ready:
            rows = logits if len(ready) == len(pieces) else logits[ready]
            tokens, logprobs = sample(rows, [sequences[row].sampler for row in ready])
        # Nothing below can fail: a sequence is either untouched by a pass or whole after it.
        for piece, sequence in zip(pieces, sequences, strict=True):
            sequence.computed = piece.end
        for place, row in enumerate(ready):
            delta = sequences[row].accept(tokens[place], logprobs[place])
            if delta is not None:
                deltas.append((sequences[row], delta))
        return deltas

    def _remove(self, leaving: set[Sequence]) -> None:
        """Close the gaps with as few copies as possible: sequences from the end move into them."""
        if not leaving:
            return
        for sequence in leaving:
            self._runner.release(sequence.slot, sequence.is_spoiled)
        stay = [sequence for sequence in self._running if sequence not in leaving]
        # A prompt that is still being read stays last.
        partial = stay.pop() if stay and stay[-1].pending > 1 else None
        taken = {sequence.slot for sequence in stay}
        gaps = [slot for slot in range(len(stay)) if slot not in taken]
        movers = [sequence for sequence in stay if sequence.slot >= len(stay)]
        for slot, sequence in zip(gaps, movers, strict=True):
            self._move(sequence, slot)
        stay.sort(key=lambda sequence: sequence.slot)
        if partial is not None:
            self._move(partial, len(stay))
            stay.append(partial)
        self._running = stay

    def _move(self, sequence: Sequence, slot: int) -> None:
        if sequence.slot != slot:
            self._runner.move(sequence.slot, slot, sequence.computed)
            sequence.slot = slot


def _constrained(sequence: Sequence, logits: torch.Tensor) -> Delta | None:
    """Forbid what the sequence's grammar forbids; a Delta where that fails."""
    assert sequence.grammar is not None
    try:
        sequence.grammar.forbid(logits)
    except InvalidCall as error:
        return Delta(error=error)
    return None


def _piece(sequence: Sequence, count: int) -> Piece:
    return Piece(sequence.slot, sequence.computed, sequence.ids[sequence.computed : sequence.computed + count])


class Engine:
    """The thread that steps the batches."""

    def __init__(self, deliver: Callable[[list[tuple[Sequence, Delta]]], None]) -> None:
        """`deliver` is called in the engine's thread, once per step that has something to say."""
        self.failure: BackendError | None = None
        self.num_steps = 0
        self._deliver = deliver
        self._batches: list[Batch] = []
        self._work = threading.Event()
        self._is_stopping = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, load: Callable[[], Iterable[Batch]], on_loaded: Callable[[BaseException | None], object]) -> None:
        """Start the thread, which calls `load` and then `on_loaded` before its first step."""
        self._thread = threading.Thread(target=self._run, args=(load, on_loaded), name="gpt-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in progress; what still runs fails."""
        self._is_stopping = True
        self._work.set()
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """BackendDead when the thread died, another BackendError when it was stopped."""
        if self.failure is not None:
            raise type(self.failure)(*self.failure.args)

    def add(self, batch: Batch, sequence: Sequence) -> None:
        """Queue `sequence`. Raises as `check` does."""
        with self._lock:
            self.check()
            batch.add(sequence)
        self._work.set()

    def _run(self, load: Callable[[], Iterable[Batch]], on_loaded: Callable[[BaseException | None], object]) -> None:
        try:
            self._batches = list(load())
        except BaseException as error:
            self._end(BackendDead(f"loading failed: {error}"))
            on_loaded(error)
            return
        on_loaded(None)
        try:
            with torch.inference_mode():
                self._loop()
            self._end(BackendError("the backend is stopping"))
        except BaseException as error:
            _log.exception("the GPT engine is dead")
            self._end(error if isinstance(error, BackendDead) else BackendDead(f"the batch loop ended: {error!r}"))

    def _loop(self) -> None:
        while True:
            self._work.wait()
            self._work.clear()
            while busy := [batch for batch in self._batches if not batch.is_idle]:
                for batch in busy:
                    if self._is_stopping:
                        return
                    if deltas := batch.step():
                        self._deliver(deltas)
                    self.num_steps += 1
            if self._is_stopping:
                return

    def _end(self, failure: BackendError) -> None:
        # Under the lock: a call is either refused by `add` or failed here, never left waiting.
        with self._lock:
            self.failure = failure
            deltas = [delta for batch in self._batches for delta in batch.fail_all(failure)]
            self._batches = []
        if deltas:
            self._deliver(deltas)
