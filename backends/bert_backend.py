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
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from backends.base import Backend, BackendDead, BackendError, Capabilities, EncodeCall, InvalidCall
from catalog import BackendSpec, ModelSpec, Task

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_OPTIONS = {"dtype", "device", "max_batch_tokens", "num_threads"}
_DTYPES = ("float32", "bfloat16")
_PACKED = "switchyard_packed"
_PROBE_TOKENS = 512


class BERTBackend(Backend):
    """Encoder models that share one thread and, within a model, forward passes."""

    capabilities: ClassVar[Capabilities] = Capabilities(tasks=frozenset({"embed", "classify", "rerank"}))

    def __init__(self, spec: BackendSpec) -> None:
        super().__init__(spec)
        if unknown := set(spec.options) - _OPTIONS:
            raise ValueError(f"{spec.name}: unknown options {sorted(unknown)}")
        self._line = _Line(int(spec.options.get("max_batch_tokens", 1024)))
        self._models: dict[str, _Model] = {}
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
            self._models[model.name] = _Model(model, torch.device(device), getattr(torch, dtype))
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

    def _model(self, call: EncodeCall, task: Task) -> "_Model":
        model = self._models.get(call.model)
        if model is None:
            raise InvalidCall(f"{self.spec.name} holds no model {call.model!r}")
        if task not in model.spec.tasks:
            raise InvalidCall(f"{call.model} does not {task}")
        model.check(call)
        return model

    async def _run(self, model: "_Model", call: EncodeCall) -> np.ndarray:
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

    model: "_Model"
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

    def store(self, index: int, row: np.ndarray) -> None:
        if self.rows is None:
            self.rows = np.empty((len(self.inputs), len(row)), np.float32)
        self.rows[index] = row
        self.num_left -= 1


@dataclass(slots=True)
class _Item:
    """One sequence of a call in a batch."""

    work: _Work
    index: int

    @property
    def ids(self) -> list[int]:
        return self.work.inputs[self.index]

    @property
    def type_ids(self) -> list[int]:
        return self.work.type_ids[self.index] if self.work.type_ids else [0] * len(self.ids)

    @property
    def length(self) -> int:
        return len(self.ids)


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
            item = _Item(work, work.order[-1])
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


class _Model:
    """One model in memory: a batch of sequences in, a row of output per sequence out."""

    def __init__(self, spec: ModelSpec, device: "torch.device", dtype: "torch.dtype") -> None:
        from transformers import AutoModel, AutoModelForSequenceClassification

        self.spec = spec
        self._is_classifier = spec.is_cross_encoder or "classify" in spec.tasks
        loader: Any = AutoModelForSequenceClassification if self._is_classifier else AutoModel
        # float32 first: the probe below compares two paths more sharply than bfloat16 could.
        self._model: Any = loader.from_pretrained(
            spec.path, dtype="float32", use_safetensors=True, trust_remote_code=False, local_files_only=True
        ).eval()
        self._config: Any = self._model.config
        self._num_types = getattr(self._config, "type_vocab_size", 0) or 1
        self._pooling, self._is_normalised = ((), False) if self._is_classifier else _sentence_modules(Path(spec.path))
        self._position_offset = 0
        self.is_packed = self._probe()
        self._model.to(device=device, dtype=dtype)
        self._device = device
        self.dimension: int = self.run(self._probe_batch()).shape[1]

    def check(self, call: EncodeCall) -> None:
        """Refuse what would fail in a forward pass, where it would take other calls down with it."""
        if not call.inputs or not all(call.inputs):
            raise InvalidCall("every input needs at least one token")
        longest = max(map(len, call.inputs))
        if longest > self.spec.context_length:
            raise InvalidCall(f"an input has {longest} tokens, {call.model} takes {self.spec.context_length}")
        if not _within(call.inputs, self._config.vocab_size):
            raise InvalidCall(f"a token id is outside the vocabulary of {call.model}")
        if call.type_ids is not None and list(map(len, call.type_ids)) != list(map(len, call.inputs)):
            raise InvalidCall("type_ids must have the lengths of the inputs")
        if call.type_ids is not None and not _within(call.type_ids, self._num_types):
            raise InvalidCall(f"{call.model} has {self._num_types} segment types")

    def run(self, batch: Sequence[_Item]) -> np.ndarray:
        """float32 [sequences, outputs] for a batch sorted by length."""
        import torch

        with torch.inference_mode():
            return self._activated(self._scores(batch)).cpu().numpy()

    def _scores(self, batch: Sequence[_Item]) -> "torch.Tensor":
        return self._packed(batch) if self.is_packed else self._padded(batch)

    def _activated(self, scores: "torch.Tensor") -> "torch.Tensor":
        import torch

        if not self._is_classifier:
            return torch.nn.functional.normalize(scores, dim=-1) if self._is_normalised else scores
        if self.spec.is_cross_encoder or self._config.problem_type == "multi_label_classification":
            return scores.sigmoid()
        return scores.softmax(dim=-1)

    def _packed(self, batch: Sequence[_Item]) -> "torch.Tensor":
        lengths = np.array([item.length for item in batch])
        starts = lengths.cumsum() - lengths
        positions = np.arange(lengths.sum()) - np.repeat(starts, lengths) + self._position_offset
        states = self._model.base_model(
            input_ids=self._tensor(itertools.chain.from_iterable(item.ids for item in batch), len(positions))[None],
            position_ids=self._tensor(positions, len(positions))[None],
            groups=[(len(list(same)), length) for length, same in itertools.groupby(lengths.tolist())],
            **self._types(batch, lambda rows: self._tensor(itertools.chain.from_iterable(rows), len(positions))[None]),
        ).last_hidden_state[0]
        if not self._is_classifier:
            return _pooled(states, self._tensor(lengths, len(lengths)), self._pooling)
        # A head reads the first state of each row: rows of one state each are all it needs.
        first = states[self._tensor(starts, len(starts))][:, None]
        pooler = getattr(self._model.base_model, "pooler", None)
        scores: torch.Tensor = self._model.classifier(pooler(first) if pooler else first).float()
        return scores

    def _padded(self, batch: Sequence[_Item]) -> "torch.Tensor":
        width = max(item.length for item in batch)
        mask = self._grid([[1] * item.length for item in batch], width)
        output = self._model(
            input_ids=self._grid([item.ids for item in batch], width, self._config.pad_token_id or 0),
            attention_mask=mask,
            **self._types(batch, lambda rows: self._grid(rows, width)),
        )
        if self._is_classifier:
            logits: torch.Tensor = output.logits.float()
            return logits
        return _pooled(output.last_hidden_state[mask.bool()], mask.sum(dim=1), self._pooling)

    def _types(self, batch: Sequence[_Item], shape: "Callable[[list[list[int]]], torch.Tensor]") -> dict[str, Any]:
        """Not every architecture takes segment ids, and those that do assume 0."""
        if self._num_types == 1 or not any(item.work.type_ids for item in batch):
            return {}
        return {"token_type_ids": shape([item.type_ids for item in batch])}

    def _tensor(self, values: Iterable[int], count: int) -> "torch.Tensor":
        import torch

        return torch.from_numpy(np.fromiter(values, np.int64, count)).to(self._device)

    def _grid(self, rows: list[list[int]], width: int, fill: int = 0) -> "torch.Tensor":
        import torch

        grid = [row + [fill] * (width - len(row)) for row in rows]
        return torch.tensor(grid, device=self._device)

    def _probe(self) -> bool:
        """Whether packing gives this model's own padded scores; sets the position offset that does."""
        import torch

        self._device = torch.device("cpu")
        batch = self._probe_batch()
        with torch.inference_mode():
            expected = self._padded(batch).numpy()
            for offset in self._position_offsets():
                self._position_offset = offset
                if self._packs_like(batch, expected):
                    return True
        log.info("model_is_padded", extra={"model": self.spec.name})
        return False

    def _probe_batch(self) -> "list[_Item]":
        """Sequences of several lengths, the longest long enough to show a sliding window."""
        vocabulary, padding = self._config.vocab_size, self._config.pad_token_id
        ids = [token for step in range(2 * _PROBE_TOKENS) if (token := step * 7919 % vocabulary) != padding]
        lengths = sorted({min(length, self.spec.context_length) for length in (3, 8, _PROBE_TOKENS)})
        work = _Work(self, [ids[:length] for length in lengths], None, asyncio.get_running_loop().create_future())
        return [_Item(work, index) for index in range(len(lengths))]

    def _position_offsets(self) -> list[int]:
        """RoBERTa and its kin number positions from their padding id + 1."""
        if not self._model._supports_attention_backend:  # noqa: SLF001 - the library offers no public question
            return []
        return [0, (self._config.pad_token_id or 0) + 1]

    def _packs_like(self, batch: Sequence[_Item], expected: np.ndarray) -> bool:
        padded_attention = self._config._attn_implementation  # noqa: SLF001 - nor here
        self._model.set_attn_implementation(_packed_attention_name())
        try:
            scores = self._packed(batch).numpy()
            if np.allclose(scores, expected, rtol=1e-3, atol=1e-3 * float(np.abs(expected).max())):
                return True
        except (AttributeError, IndexError, RuntimeError, TypeError) as error:
            log.debug("model_cannot_be_packed", extra={"model": self.spec.name, "reason": str(error)})
        self._model.set_attn_implementation(padded_attention)
        return False


def _within(rows: list[list[int]], end: int) -> bool:
    return min(map(min, rows)) >= 0 and max(map(max, rows)) < end


def _packed_attention_name() -> str:
    from transformers import AttentionInterface

    AttentionInterface.register(_PACKED, _packed_attention)
    return _PACKED


def _packed_attention(
    _module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    _mask: "torch.Tensor | None",
    *,
    groups: list[tuple[int, int]],
    scaling: float | None = None,
    **_: Any,
) -> "tuple[torch.Tensor, None]":
    """Attention inside each sequence of one packed row, a call per length: [1, heads, tokens, size] in,
    [1, tokens, heads, size] out. `groups` counts the sequences of each length in their order in the row."""
    import torch

    num_heads, size = query.shape[1], query.shape[3]
    rows = [states.transpose(1, 2)[0] for states in (query, key, value)]
    outputs = []
    start = 0
    for count, length in groups:
        end = start + count * length
        q, k, v = (states[start:end].view(count, length, num_heads, size).transpose(1, 2) for states in rows)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        outputs.append(attended.transpose(1, 2).reshape(end - start, num_heads, size))
        start = end
    return torch.cat(outputs)[None], None


def _sentence_modules(folder: Path) -> tuple[tuple[str, ...], bool]:
    """Pooling modes and whether rows are normalised, from a sentence-transformers folder.

    A folder without modules.json gets what sentence-transformers gives it: the mean, not normalised.
    """
    if not (folder / "modules.json").exists():
        return ("mean",), False
    modules = {m["type"].rpartition(".")[2]: m["path"] for m in json.loads((folder / "modules.json").read_text())}
    if unknown := set(modules) - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(f"{folder}: modules {sorted(unknown)} are not supported")
    if "Pooling" not in modules:
        return ("mean",), "Normalize" in modules
    config = json.loads((folder / modules["Pooling"] / "config.json").read_text())
    return _pooling_modes(config), "Normalize" in modules


def _pooling_modes(config: dict[str, Any]) -> tuple[str, ...]:
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        modes = (modes,) if isinstance(modes, str) else tuple(modes)
    else:
        modes = tuple(mode for mode in _POOLINGS if config.get(_LEGACY_KEYS.get(mode, f"pooling_mode_{mode}_tokens")))
    if unknown := set(modes) - set(_POOLINGS):
        raise ValueError(f"pooling modes {sorted(unknown)} are not supported")
    return modes or ("mean",)


_LEGACY_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def _pooled(states: "torch.Tensor", lengths: "torch.Tensor", modes: tuple[str, ...]) -> "torch.Tensor":
    """float32 [sequences, modes x hidden] of packed states [tokens, hidden]."""
    import torch

    return torch.cat([_POOLINGS[mode](states.float(), lengths) for mode in modes], dim=-1)


def _reduce(how: str) -> "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]":
    def pool(states: "torch.Tensor", lengths: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.segment_reduce(states, how, lengths=lengths, axis=0)

    return pool


def _weighted_mean(states: "torch.Tensor", lengths: "torch.Tensor") -> "torch.Tensor":
    """Later tokens weigh more: the i-th, from 1, weighs i."""
    import torch

    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    weights = (torch.arange(len(states), device=states.device) - starts + 1).to(states.dtype)
    total = (lengths * (lengths + 1) / 2).to(states.dtype)
    return torch.segment_reduce(states * weights[:, None], "sum", lengths=lengths, axis=0) / total[:, None]


_POOLINGS: "dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]" = {
    "cls": lambda states, lengths: states[lengths.cumsum(0) - lengths],
    "max": _reduce("max"),
    "mean": _reduce("mean"),
    "mean_sqrt_len_tokens": lambda states, lengths: _reduce("sum")(states, lengths) / lengths[:, None].sqrt(),
    "weightedmean": _weighted_mean,
    "lasttoken": lambda states, lengths: states[lengths.cumsum(0) - 1],
}
"""In the order in which sentence-transformers concatenates several."""


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
