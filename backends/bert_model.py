"""An encoder in memory: packed where its architecture allows it exactly, padded where not."""

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from backends import pooling
from backends.base import EncodeCall, InvalidCall
from catalog import ModelSpec

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_PACKED = "switchyard_packed"
_PROBE_TOKENS = 512


@dataclass(slots=True)
class Row:
    """The tokens of one text, or of a cross-encoder's pair."""

    ids: list[int]
    type_ids: list[int] | None = None
    """Segment ids beside `ids`; None: all 0."""

    @property
    def length(self) -> int:
        return len(self.ids)


class BERTModel:
    """A batch of rows in, a row of output for each out."""

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
        self._pooling, self._is_normalised = (
            ((), False) if self._is_classifier else pooling.sentence_modules(Path(spec.path))
        )
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

    def run(self, batch: Sequence[Row]) -> np.ndarray:
        """float32 [sequences, outputs] for a batch sorted by length."""
        import torch

        with torch.inference_mode():
            return self._activated(self._scores(batch)).cpu().numpy()

    def _scores(self, batch: Sequence[Row]) -> "torch.Tensor":
        return self._packed(batch) if self.is_packed else self._padded(batch)

    def _activated(self, scores: "torch.Tensor") -> "torch.Tensor":
        import torch

        if not self._is_classifier:
            return torch.nn.functional.normalize(scores, dim=-1) if self._is_normalised else scores
        if self.spec.is_cross_encoder or self._config.problem_type == "multi_label_classification":
            return scores.sigmoid()
        return scores.softmax(dim=-1)

    def _packed(self, batch: Sequence[Row]) -> "torch.Tensor":
        lengths = np.array([row.length for row in batch])
        starts = lengths.cumsum() - lengths
        positions = np.arange(lengths.sum()) - np.repeat(starts, lengths) + self._position_offset
        states = self._model.base_model(
            input_ids=self._tensor(itertools.chain.from_iterable(row.ids for row in batch), len(positions))[None],
            position_ids=self._tensor(positions, len(positions))[None],
            groups=[(len(list(same)), length) for length, same in itertools.groupby(lengths.tolist())],
            **self._types(batch, lambda rows: self._tensor(itertools.chain.from_iterable(rows), len(positions))[None]),
        ).last_hidden_state[0]
        if not self._is_classifier:
            return pooling.pooled(states, self._tensor(lengths, len(lengths)), self._pooling)
        # A head reads the first state of each row: rows of one state each are all it needs.
        first = states[self._tensor(starts, len(starts))][:, None]
        pooler = getattr(self._model.base_model, "pooler", None)
        scores: torch.Tensor = self._model.classifier(pooler(first) if pooler else first).float()
        return scores

    def _padded(self, batch: Sequence[Row]) -> "torch.Tensor":
        width = max(row.length for row in batch)
        mask = self._grid([[1] * row.length for row in batch], width)
        output = self._model(
            input_ids=self._grid([row.ids for row in batch], width, self._config.pad_token_id or 0),
            attention_mask=mask,
            **self._types(batch, lambda rows: self._grid(rows, width)),
        )
        if self._is_classifier:
            logits: torch.Tensor = output.logits.float()
            return logits
        return pooling.pooled(output.last_hidden_state[mask.bool()], mask.sum(dim=1), self._pooling)

    def _types(self, batch: Sequence[Row], shape: "Callable[[list[list[int]]], torch.Tensor]") -> dict[str, Any]:
        """Not every architecture takes segment ids, and those that do assume 0."""
        if self._num_types == 1 or not any(row.type_ids for row in batch):
            return {}
        return {"token_type_ids": shape([row.type_ids or [0] * row.length for row in batch])}

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

    def _probe_batch(self) -> "list[Row]":
        """Sequences of several lengths, the longest long enough to show a sliding window."""
        vocabulary, padding = self._config.vocab_size, self._config.pad_token_id
        ids = [token for step in range(2 * _PROBE_TOKENS) if (token := step * 7919 % vocabulary) != padding]
        lengths = sorted({min(length, self.spec.context_length) for length in (3, 8, _PROBE_TOKENS)})
        return [Row(ids[:length]) for length in lengths]

    def _position_offsets(self) -> list[int]:
        """RoBERTa and its kin number positions from their padding id + 1."""
        if not self._model._supports_attention_backend:  # noqa: SLF001 - the library offers no public question
            return []
        return [0, (self._config.pad_token_id or 0) + 1]

    def _packs_like(self, batch: Sequence[Row], expected: np.ndarray) -> bool:
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
