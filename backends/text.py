"""Token ids to text, a token at a time, for runtimes that do not detokenise themselves."""

from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """One sequence's text. `push` returns what the new tokens add; special tokens are left out.

    A character whose bytes span tokens is held back until it is whole; `finish` gives what is left.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int] | None = None) -> None:
        self._tokenizer = tokenizer
        self._stream: Any = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []
        for token in context or ():
            self._step(token)

    def push(self, tokens: list[int] | tuple[int, ...]) -> str:
        return "".join(self._step(token) for token in tokens)

    def finish(self) -> str:
        """The bytes still held back, each unfinished character as U+FFFD."""
        if not self._held:
            return ""
        text: str = self._tokenizer.decode(self._held, skip_special_tokens=True)
        self._held.clear()
        return text

    def _step(self, token: int) -> str:
        text = self._stream.step(self._tokenizer, token)
        if text is None:
            self._held.append(token)
            return ""
        self._held.clear()
        return str(text)
