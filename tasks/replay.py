"""A finished stream, event by event, from the stored answer.

Redis keeps a stream's events for minutes; Postgres keeps the answer, and of the events only where each
one ended. That is enough to make the same frames again, under the same numbers, for as long as the job
is kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from tasks.call import Call
from tasks.output import Piece
from tasks.responses import echoed
from tasks.stream import Event

Mark = tuple[int, int, int]
"""Of one event: its choice, and by how many characters and log probabilities that choice grew."""


def encode(first: int, marks: Sequence[Mark]) -> bytes:
    """`first` is the number of the first event."""
    return orjson.dumps({"first": first, "marks": marks})


def events(call: Call, body: bytes, stored: bytes | None) -> Iterator[Event]:
    """The events of the answer `body`. Without stored marks (the job was not streamed) one for each choice."""
    choices = orjson.loads(body)["choices"]
    rest = {choice["index"]: _Rest(call, choice) for choice in choices}
    if stored is None:
        for seq, (index, one) in enumerate(rest.items(), 1):
            yield Event(seq, index, one.take(len(one.text), len(one.logprobs), is_last=True))
        return
    decoded = orjson.loads(stored)
    marks = decoded["marks"]
    last_of = {mark[0]: position for position, mark in enumerate(marks)}
    for position, (index, length, num_logprobs) in enumerate(marks):
        piece = rest[index].take(length, num_logprobs, is_last=last_of[index] == position)
        yield Event(decoded["first"] + position, index, piece)


class _Rest:
    """What of one choice has not been taken yet."""

    def __init__(self, call: Call, choice: dict[str, Any]) -> None:
        self.finish_reason = choice["finish_reason"]
        logprobs = choice.get("logprobs")
        if "message" in choice:
            self.text: str = choice["message"]["content"]
            self.logprobs: list[dict[str, Any]] = (logprobs or {}).get("content") or []
        else:
            self.text = choice["text"].removeprefix(echoed(call, choice["index"]))
            self.logprobs = _entries(logprobs) if logprobs else []

    def take(self, length: int, num_logprobs: int, *, is_last: bool) -> Piece:
        text, self.text = self.text[:length], self.text[length:]
        logprobs, self.logprobs = self.logprobs[:num_logprobs], self.logprobs[num_logprobs:]
        return Piece(text, (), logprobs, self.finish_reason if is_last else None)


def _entries(logprobs: dict[str, Any]) -> list[dict[str, Any]]:
    """The completions form of log probabilities, token by token."""
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    return [
        {
            "token": token,
            "logprob": logprob,
            "top_logprobs": [{"token": name, "logprob": value} for name, value in top.items()],
        }
        for token, logprob, top in rows
    ]
