"""Next tokens for many sequences at once, each by its own `SamplingParams`.

The order is vLLM's: bias and min_tokens, penalties, temperature, min_p, top_k, top_p, draw. Rows that
ask for nothing special cost one argmax or one softmax of the whole batch. The draw for the k-th token
of a sequence is a function of (seed, k) alone, so neither the neighbours in a batch nor an interrupted
attempt change it.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch

from backends.base import SamplingParams, TokenLogprob

_SHORTLISTS = (256, 4096)
"""How many candidates are sorted for top_p and top_k before a row has to sort the whole vocabulary. Measured for
49152 tokens on a CPU: 0.1 ms, 0.5 ms and 3.6 ms a row."""


_BLOCK = 8
"""Rows drawn at a time on a CPU, so that what is computed on the way stays in its cache: 32 rows of 49152 tokens
take 6.4 ms, against 16 ms at once."""


class Sampler:
    """One sequence's sampling state. Not shared between sequences."""

    def __init__(
        self, params: SamplingParams, seed: int, stops: Iterable[int], prompt: list[int], generated: Iterable[int]
    ) -> None:
        self.params = params
        self.position = 0
        """How many tokens the sequence has generated; the index of the next draw."""
        self._seed = seed
        self._stops = torch.tensor(sorted(stops), dtype=torch.long)
        self._bias = _bias(params)
        self._counts = _counts(params, prompt)
        for token in generated:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Count `token` as generated."""
        self.position += 1
        if self._counts is not None:
            self._counts.add(token)

    def adjust(self, logits: torch.Tensor) -> None:
        """Apply bias, min_tokens and penalties to one row [vocabulary], in place."""
        if self._bias is not None:
            tokens, values = self._bias
            logits[tokens.to(logits.device)] += values.to(logits.device)
        if self.position < self.params.min_tokens:
            logits[self._stops.to(logits.device)] = float("-inf")
        if self._counts is not None:
            self._counts.penalise(logits, self.params)

    def uniform(self) -> float:
        """The draw in [0, 1) for the next token."""
        digest = hashlib.blake2b(b"%d:%d" % (self._seed, self.position), digest_size=8).digest()
        return (int.from_bytes(digest) >> 11) * 2.0**-53


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> tuple[list[int], list[TokenLogprob | None]]:
    """A token per row of `logits` [rows, vocabulary] (float32, consumed), and its log probabilities if asked for."""
    reported = [row for row, sampler in enumerate(samplers) if sampler.params.logprobs is not None]
    logprobs = torch.log_softmax(logits[reported], -1) if reported else None
    for row, sampler in enumerate(samplers):
        sampler.adjust(logits[row])
    tokens = logits.argmax(-1).tolist()
    drawn = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    block = _BLOCK if logits.device.type == "cpu" else len(drawn)
    for start in range(0, len(drawn), max(1, block)):
        rows = drawn[start : start + block]
        for row, token in zip(rows, _draw(logits[rows], [samplers[row] for row in rows]).tolist(), strict=True):
            tokens[row] = token
    report: list[TokenLogprob | None] = [None] * len(samplers)
    if logprobs is not None:
        wanted = [samplers[row].params.logprobs or 0 for row in reported]
        for row, entry in zip(reported, _report(logprobs, [tokens[row] for row in reported], wanted), strict=True):
            report[row] = entry
    return tokens, report


def _draw(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Inverse transform sampling, in the order of token ids: two tokens of nearly equal probability that
    swap ranks between two batches then cannot swap their share of [0, 1)."""
    params = [sampler.params for sampler in samplers]
    probs = torch.softmax(logits / _column([p.temperature for p in params], logits), -1)
    if any(p.min_p > 0 for p in params):
        floor = _column([p.min_p for p in params], probs) * probs.amax(-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0.0)
    cut = [row for row, p in enumerate(params) if p.top_p < 1 or 0 < p.top_k < probs.shape[-1]]
    if cut:
        probs[cut] = _truncate(probs[cut], [params[row] for row in cut])
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = _column([sampler.uniform() for sampler in samplers], total) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _truncate(probs: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """`probs` [rows, vocabulary] with everything outside top_k, then outside top_p of what is left, zero."""
    size = probs.shape[-1]
    limits = [p.top_k if 0 < p.top_k < size else size for p in params]
    kept = torch.zeros_like(probs)
    left = list(range(len(params)))
    for width in (*(width for width in _SHORTLISTS if width < size), size):
        rows, is_enough = _shortlist(probs[left], [params[i] for i in left], [limits[i] for i in left], width)
        kept[left] = rows
        left = [i for i, is_done in zip(left, is_enough.tolist(), strict=True) if not is_done]
        if not left:
            break
    return kept


def _shortlist(
    probs: torch.Tensor, params: list[SamplingParams], limits: list[int], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The truncated rows, and for which of them the `width` best candidates were enough to tell."""
    values, tokens = probs.topk(width, -1)
    limit = _column(limits, values)
    values = values.masked_fill(torch.arange(width, device=values.device) >= limit, 0.0)
    within = values.sum(-1, keepdim=True)
    is_unlimited = limit == probs.shape[-1]
    mass = torch.where(is_unlimited, probs.sum(-1, keepdim=True), within)
    top_p = _column([p.top_p for p in params], values)
    below = values.cumsum(-1) - values
    # top_p 0 keeps the best token; 1 keeps all, which the rounding of a sum near 1 must not shorten.
    is_kept = (below < top_p * mass) | (top_p >= 1)
    is_kept[:, 0] = True
    is_enough = torch.where(is_unlimited, within >= top_p * mass, limit <= width)
    return torch.zeros_like(probs).scatter_(-1, tokens, values * is_kept), is_enough[:, 0]


def _report(logprobs: torch.Tensor, tokens: list[int], wanted: list[int]) -> list[TokenLogprob]:
    own = logprobs.gather(-1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()
    if not any(wanted):
        return [TokenLogprob(token, value) for token, value in zip(tokens, own, strict=True)]
    values, ids = logprobs.topk(max(wanted), -1)
    pairs = zip(tokens, own, ids.tolist(), values.tolist(), wanted, strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, value, row_ids, row_values, count in pairs
    ]


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _bias(params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not params.logit_bias:
        return None
    return torch.tensor(list(params.logit_bias)), torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)


def _counts(params: SamplingParams, prompt: list[int]) -> "_Counts | None":
    if params.repetition_penalty != 1:
        return _Counts(prompt)
    if params.presence_penalty or params.frequency_penalty:
        return _Counts(())
    return None


class _Counts:
    """The distinct tokens that penalties touch, and how often each was generated.

    Sparse on purpose: a penalty then costs a gather of what was seen, not passes over the vocabulary.
    """

    def __init__(self, seen: Iterable[int]) -> None:
        distinct = list(dict.fromkeys(seen))
        self._place = {token: place for place, token in enumerate(distinct)}
        self._tokens = torch.zeros(max(64, 2 * len(distinct)), dtype=torch.long)
        self._tokens[: len(distinct)] = torch.tensor(distinct, dtype=torch.long)
        self._counts = torch.zeros(len(self._tokens))

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._tokens):
            self._tokens = torch.cat([self._tokens, torch.zeros_like(self._tokens)])
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1

    def penalise(self, logits: torch.Tensor, params: SamplingParams) -> None:
        tokens = self._tokens[: len(self._place)].to(logits.device)
        counts = self._counts[: len(self._place)].to(logits.device)
        values = logits[tokens]
        values = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        logits[tokens] = values - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
