"""From a backend's raw chunks to the text a caller sees: stop strings cut, masked strings replaced,
log probabilities named. One `Output` per choice; live, cached and streamed answers all pass through it.
"""

from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from backends.base import Chunk, FinishReason, TokenLogprob

_MASK = "***"


@dataclass(frozen=True, slots=True)
class Piece:
    """What a chunk adds to a choice once it is safe to show."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: list[dict[str, Any]]
    finish_reason: FinishReason | None = None
    held: str = ""
    """Text that waits for the next piece; an attempt that takes over starts with it."""


@dataclass(slots=True)
class Output:
    """One choice under construction.

    Text that could still turn out to begin a stop string or a masked string is held back, so nothing
    shown is ever taken back, also where such a string spans chunks or attempts.
    """

    stop: list[str]
    mask: list[str]
    tokenizer: Tokenizer | None = None
    """Names the tokens of log probabilities; None where none were asked for."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    matched_stop: str | None = None
    """The stop string that ended it."""
    _held: str = ""

    def push(self, chunk: Chunk) -> Piece:
        """Take the next chunk. A piece with a finish_reason is the last: stop generating then."""
        self._held += chunk.text
        found = _first(self._held, self.stop)
        if found is not None:
            cut, self.matched_stop = found
            self._held = self._held[:cut]
            return self._release(chunk, len(self._held), "stop")
        if chunk.finish_reason is not None:
            return self._release(chunk, len(self._held), chunk.finish_reason)
        return self._release(chunk, len(self._held) - overlap(self._held, self.stop + self.mask), None)

    def resume(self, piece: Piece) -> None:
        """Take a piece that an earlier attempt has shown already."""
        self.token_ids.extend(piece.token_ids)
        self.text += piece.text
        self.logprobs += piece.logprobs
        self._held = piece.held
        self.finish_reason = piece.finish_reason

    def _release(self, chunk: Chunk, length: int, reason: FinishReason | None) -> Piece:
        text, held = self._held[:length], self._held[length:]
        for masked in self.mask:
            text = text.replace(masked, _MASK)
        piece = Piece(text, chunk.token_ids, [self._named(entry) for entry in chunk.logprobs], reason, held)
        self.resume(piece)
        return piece

    def _named(self, entry: TokenLogprob) -> dict[str, Any]:
        return {
            **self._token(entry.token_id, entry.logprob),
            "top_logprobs": [self._token(token, logprob) for token, logprob in entry.top],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        assert self.tokenizer is not None
        text = self.tokenizer.decode([token_id], skip_special_tokens=False)
        # JSON has no -inf; OpenAI's own floor for "never" is -9999.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def _first(text: str, wanted: list[str]) -> tuple[int, str] | None:
    """Where the earliest of the wanted strings begins, and which it is."""
    found = [(position, string) for string in wanted if (position := text.find(string)) >= 0]
    return min(found, default=None)


def overlap(text: str, wanted: list[str]) -> int:
    """How many characters at the end may be the beginning of a wanted string.

    A whole masked string needs no holding back, but one that may still grow into a longer one does."""
    longest = 0
    for string in wanted:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
