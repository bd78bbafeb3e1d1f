"""From token states to one row per sequence, as a model's sentence-transformers folder says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def sentence_modules(folder: Path) -> tuple[tuple[str, ...], bool]:
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


def pooled(states: "torch.Tensor", lengths: "torch.Tensor", modes: tuple[str, ...]) -> "torch.Tensor":
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
