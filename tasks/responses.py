"""The public form of every answer: one final body per job, and the frames of a stream.

The worker builds the body, which is stored and served as these bytes. A gateway builds the frames of a
live stream from the same choices, and those of a cached stream from the stored body. Each family of
endpoints has a file of its own; `_FAMILIES` says whose is whose.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from tasks import responses_anthropic, responses_openai
from tasks.call import Call
from tasks.identity import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Identity, StoredChoice
from tasks.output import Output
from tasks.stream import Event


class Frames(Protocol):
    """The server-sent events of one generation stream, from its first to its last."""

    def event(self, event: Event) -> bytes:
        """An event's frame, under its number. Events come in order, from the first one on."""

    def end(self, usage: Mapping[str, int] | None, body: bytes) -> bytes:
        """What follows the last event of the job whose answer is `body`."""

    def replay(self, body: dict[str, Any]) -> Iterator[bytes]:
        """A finished answer as a stream: one piece a choice."""


class _Family(Protocol):
    def generated(self, identity: Identity, call: Call, outputs: Sequence[Output]) -> bytes: ...

    def frames(self, identity: Identity, call: Call) -> Frames: ...

    def stored(self, call: Call, body: dict[str, Any]) -> list[StoredChoice]: ...


_FAMILIES: Mapping[str, _Family] = {
    CHAT: responses_openai,
    COMPLETIONS: responses_openai,
    MESSAGES: responses_anthropic,
    RESPONSES: responses_openai,
}


def generated(identity: Identity, call: Call, outputs: Sequence[Output]) -> bytes:
    """The body of a generation job."""
    return _FAMILIES[identity.endpoint].generated(identity, call, outputs)


def frames(identity: Identity, call: Call) -> Frames:
    """The stream of a generation job, from its beginning."""
    return _FAMILIES[identity.endpoint].frames(identity, call)


def stored(call: Call, body: dict[str, Any]) -> list[StoredChoice]:
    """What was generated, read back from the stored answer."""
    return _FAMILIES[call.endpoint].stored(call, body)
