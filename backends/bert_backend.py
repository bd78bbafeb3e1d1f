"""Encoders on Transformers: embeddings, classification and reranking, several models in one process.

One thread runs the models. Calls on the event loop queue their sequences; each forward pass takes a fair share
from every call that waits, up to a token budget, so small calls share a pass and a large call spans several
without holding the others up. A pass wakes the loop at most once.

Sequences are packed, not padded: they lie end to end in one row, and attention runs once per length. A model
whose architecture cannot be packed exactly (found out at start, against its own padded output) is padded.

Options:
    dtype             float32 (default) or bfloat16.
    device            auto (default: cuda where there is one), cpu, cuda, cuda:1, ...
    max_batch_tokens  tokens of one forward pass, padding included (default 1024: on a CPU more is not faster and
                      holds newcomers up; a GPU wants more). A longer sequence runs alone.
    num_threads       threads of one forward pass on a CPU (default 0: torch decides).
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from backends.base import Backend, BackendDead, BackendError, Capabilities, EncodeCall, InvalidCall
from backends.bert_model import BERTModel, Row
from catalog import BackendSpec, Task

log = logging.getLogger(__name__)

_OPTIONS = {"dtype", "device", "max_batch_tokens", "num_threads"}
_DTYPES = ("float32", "bfloat16")


class BERTBackend(Backend):
    """Encoder models that share one thread and, within a model, forward passes."""

    capabilities: ClassVar[Capabilities] = Capabilities(tasks=frozenset({"embed", "classify", "rerank"}))

    def __init__(self, spec: BackendSpec) -> None:
        super().__init__(spec)
        if unknown := set(spec.options) - _OPTIONS:
            raise ValueError(f"{spec.name}: unknown options {sorted(unknown)}")
        self._line = _Line(int(spec.options.get("max_batch_tokens", 1024)))
        self._models: dict[str, BERTModel] = {}
        self._thread: threading.Thread | None = None
        self._death: BaseException | None = None
        self.num_forward_passes = 0
        self.num_tokens = 0
        """Tokens computed, padding not counted."""

    async def start(self) -> None:
        import torch

        torch.set_num_threads(int(self.spec.options.get("num_threads", 0)) or torch.get_num_threads())
        dtype = self.spec.options.get("dtype", "float32")
        if dtype not in _DTYPES:
            raise ValueError(f"{self.spec.name}: dtype must be one of {_DTYPES}")
        device = self.spec.options.get("device", "auto")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        for model in self.spec.models:
            self._models[model.name] = BERTModel(model, torch.device(device), getattr(torch, dtype))
        self._thread = threading.Thread(
            target=self._serve, args=(asyncio.get_running_loop(),), name="bert-forward", daemon=True
        )
        self._thread.start()

    async def stop(self) -> None:
        _fail(self._line.close(), BackendError(f"{self.spec.name} is stopping"))
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._models.clear()

    def check_health(self) -> None:
        if self._death is not None:
            raise BackendDead(f"the forward thread died: {self._death!r}") from self._death
        if self._thread is not None and not self._thread.is_alive():
            raise BackendDead("the forward thread has ended")

    def num_steps(self) -> int:
        return self.num_forward_passes

    async def embed(self, call: EncodeCall) -> np.ndarray:
        model = self._model(call, "embed")
        if call.dimensions is not None and not 1 <= call.dimensions <= model.dimension:
            raise InvalidCall(f"dimensions must be between 1 and {model.dimension}")
        rows = await self._run(model, call)
        return rows if call.dimensions is None else _normalised(rows[:, : call.dimensions])

    async def classify(self, call: EncodeCall) -> np.ndarray:
        return await self._run(self._model(call, "classify"), call)

    async def rerank(self, call: EncodeCall) -> np.ndarray:
        model = self._model(call, "rerank")
        if model.spec.is_cross_encoder:
            return (await self._run(model, call))[:, 0]
        if len(call.inputs) < 2:
            raise InvalidCall("a query and at least one document are needed")
        rows = _normalised(await self._run(model, call))
        similarities: np.ndarray = rows[1:] @ rows[0]
        return similarities

    def _model(self, call: EncodeCall, task: Task) -> BERTModel:
        model = self._models.get(call.model)
        if model is None:
            raise InvalidCall(f"{self.spec.name} holds no model {call.model!r}")
        if task not in model.spec.tasks:
            raise InvalidCall(f"{call.model} does not {task}")
        model.check(call)
        return model

    async def _run(self, model: BERTModel, call: EncodeCall) -> np.ndarray:
        """float32 [inputs, outputs of the model], once the last of the call's sequences is computed."""
        self.check_health()
        work = _Work(model, call.inputs, call.type_ids, asyncio.get_running_loop().create_future())
        self._line.add(work)
        try:
            return await work.future
        except asyncio.CancelledError:
            self._line.drop(work)
            raise

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread: batches until the line is closed. Whatever ends it, nobody is left waiting."""
        try:
            while batch := self._line.take():
                self._forward(batch, loop)
        except BaseException as error:
            self._death = error
            log.critical("forward_thread_died", exc_info=True)
        finally:
            stranded = self._line.close()
            _wake(loop, _fail, stranded, BackendDead("the forward thread has ended"))

    def _forward(self, batch: "list[_Item]", loop: asyncio.AbstractEventLoop) -> None:
        """One forward pass. An error fails the calls that had a part in it, and only those."""
        import torch

        works = list(dict.fromkeys(item.work for item in batch))
        try:
            rows = works[0].model.run(batch)
        except BaseException as error:
            for work in works:
                self._line.drop(work)
            _wake(loop, _fail, works, BackendError(f"{works[0].model.spec.name}: {type(error).__name__}: {error}"))
            # A failed kernel leaves the CUDA context unusable for the rest of the process.
            if isinstance(error, torch.AcceleratorError) or not isinstance(error, Exception):
                raise
            log.exception("forward_failed", extra={"model": works[0].model.spec.name, "num_calls": len(works)})
            return
        self.num_forward_passes += 1
        self.num_tokens += sum(item.length for item in batch)
        for item, row in zip(batch, rows, strict=True):
            item.work.store(item.index, row)
        _wake(loop, _deliver, [work for work in works if not work.num_left])


@dataclass(eq=False, slots=True)
class _Work:
    """One call on its way through the batches."""

    model: BERTModel
    inputs: list[list[int]]
    type_ids: list[list[int]] | None
    future: "asyncio.Future[np.ndarray]"
    order: list[int] = field(init=False)
    """Inputs no batch has taken yet, longest last: neighbours have like lengths."""
    num_left: int = field(init=False)
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.order = sorted(range(len(self.inputs)), key=lambda index: len(self.inputs[index]))
        self.num_left = len(self.inputs)

    def item(self, index: int) -> "_Item":
        type_ids = self.type_ids[index] if self.type_ids else None
        return _Item(self.inputs[index], type_ids, work=self, index=index)

    def store(self, index: int, row: np.ndarray) -> None:
        if self.rows is None:
            self.rows = np.empty((len(self.inputs), len(row)), np.float32)
        self.rows[index] = row
        self.num_left -= 1


@dataclass(slots=True)
class _Item(Row):
    """One sequence of a call in a batch."""

    work: _Work = field(kw_only=True)
    index: int = field(kw_only=True)


class _Line:
    """The calls that wait, in turn; shared by the loop (add, drop) and the thread (take)."""

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError("max_batch_tokens must be positive")
        self._max_tokens = max_tokens
        self._waiting: list[_Work] = []
        self._is_closed = False
        self._changed = threading.Condition()

    def add(self, work: _Work) -> None:
        with self._changed:
            if self._is_closed:
                raise BackendDead("the backend is stopped")
            self._waiting.append(work)
            self._changed.notify()

    def drop(self, work: _Work) -> None:
        """Take a call out. What a running pass already holds of it is computed for nothing."""
        with self._changed:
            work.order.clear()
            if work in self._waiting:
                self._waiting.remove(work)

    def close(self) -> list[_Work]:
        """Refuse new calls, end `take`, and give back the calls that still waited."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
            stranded, self._waiting = self._waiting, []
            return stranded

    def take(self) -> list[_Item]:
        """The next batch, shortest sequence first. Waits for one; empty once the line is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            return [] if self._is_closed else self._fill()

    def _fill(self) -> list[_Item]:
        """A batch for the model of the first call in line; calls left with a rest go to the back.

        In each round every call may add its share of the budget. The first in line always adds a sequence, so
        each call is served within as many batches as there are calls before it, however large those are. A share
        is an eighth of the budget at least: else a large call would crawl among hundreds of small ones.
        """
        model = self._waiting[0].model
        turn = [work for work in self._waiting if work.model is model]
        share = max(1, self._max_tokens // min(8, len(turn)))
        batch = _Room(self._max_tokens, model.is_packed)
        while turn:
            turn = [work for work in turn if batch.admit(work, share) and work.order]
        served = dict.fromkeys(item.work for item in batch.items)
        self._waiting = [work for work in self._waiting if work not in served] + [w for w in served if w.order]
        return sorted(batch.items, key=lambda item: item.length)


class _Room:
    """A batch while it is filled: what it holds and what still fits."""

    def __init__(self, max_tokens: int, is_packed: bool) -> None:
        self.items: list[_Item] = []
        self._max_tokens = max_tokens
        self._is_packed = is_packed
        self._num_tokens = 0
        self._longest = 0

    def admit(self, work: _Work, share: int) -> bool:
        """Take sequences of `work`, about `share` tokens of them. False if the next one does not fit."""
        taken = 0
        while work.order and taken < share:
            item = work.item(work.order[-1])
            if self.items and self._cost_with(item.length) > self._max_tokens:
                return False
            work.order.pop()
            self.items.append(item)
            self._num_tokens += item.length
            self._longest = max(self._longest, item.length)
            taken += item.length
        return True

    def _cost_with(self, length: int) -> int:
        if self._is_packed:
            return self._num_tokens + length
        return max(self._longest, length) * (len(self.items) + 1)


def _normalised(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    normalised: np.ndarray = rows / np.maximum(norms, 1e-12)
    return normalised


def _wake(loop: asyncio.AbstractEventLoop, function: Callable[..., None], works: list[_Work], *args: Any) -> None:
    """Once for all `works`. A loop that is closed has nobody left to tell."""
    if works and not loop.is_closed():
        loop.call_soon_threadsafe(function, works, *args)


def _deliver(works: list[_Work]) -> None:
    for work in works:
        if not work.future.done() and work.rows is not None:
            work.future.set_result(work.rows)


def _fail(works: list[_Work], error: BackendError) -> None:
    for work in works:
        if not work.future.done():
            work.future.set_exception(error)
