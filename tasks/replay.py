"""A finished stream, event by event, from the stored answer.

Redis keeps a stream's events for minutes; Postgres keeps the answer, and of the events only where each
one ended. That is enough to make the same frames again, under the same numbers, for as long as the job
is kept.
"""

from collections.abc import Iterator, Sequence

import orjson

from tasks import responses
from tasks.call import Call
from tasks.identity import StoredChoice
from tasks.output import Piece
from tasks.stream import Event

Mark = tuple[int, int, int]
"""Of one event: its choice, and by how many characters and log probabilities that choice grew."""


def encode(first: int, marks: Sequence[Mark]) -> bytes:
    """`first` is the number of the first event."""
    return orjson.dumps({"first": first, "marks": marks})


def events(call: Call, body: bytes, stored: bytes | None) -> Iterator[Event]:
    """The events of the answer `body`. Without stored marks (the job was not streamed) one for each choice."""
    rest = {choice.index: _Rest(choice) for choice in responses.stored(call, orjson.loads(body))}
    if stored is None:
        for seq, (index, one) in enumerate(rest.items(), 1):
            yield Event(seq, index, one.take_all())
        return
    decoded = orjson.loads(stored)
    marks = decoded["marks"]
    last_of = {mark[0]: position for position, mark in enumerate(marks)}
    for position, (index, length, num_logprobs) in enumerate(marks):
        is_last = last_of[index] == position
        piece = rest[index].take_all() if is_last else rest[index].take(length, num_logprobs)
        yield Event(decoded["first"] + position, index, piece)


class _Rest:
    """What of one choice has not been taken yet."""

    def __init__(self, choice: StoredChoice) -> None:
        self._text, self._logprobs = choice.text, choice.logprobs
        self._finish_reason = choice.finish_reason

    def take(self, length: int, num_logprobs: int) -> Piece:
        text, self._text = self._text[:length], self._text[length:]
        logprobs, self._logprobs = self._logprobs[:num_logprobs], self._logprobs[num_logprobs:]
        return Piece(text, (), logprobs)

    def take_all(self) -> Piece:
        return Piece(self._text, (), self._logprobs, self._finish_reason)
