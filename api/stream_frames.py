"""How a job's stream looks on the wire, its failure included."""

from typing import Protocol

from api import error_forms
from api.errors import APIError
from db.job_views import Outcome
from db.states import JobStatus
from tasks import responses
from tasks.call import Call
from tasks.identity import Identity
from tasks.stream import Event


class StreamFrames(Protocol):
    """The server-sent events of one stream, from its first to its last."""

    def begin(self) -> bytes:
        """What is known before the first token."""

    def event(self, event: Event) -> bytes:
        """An event's frame, under its number. Events come in order, from the first one on."""

    def end(self, outcome: Outcome, body: bytes) -> bytes:
        """What follows the last event of the job whose answer is `body`."""

    def failed(self, error: APIError, status: JobStatus | None = None) -> bytes:
        """The end of a stream without an answer. `status` is the job's final one; None where only this stream
        cannot go on."""


class EndpointFrames:
    """The form that the endpoint itself streams in, which has nothing to say before the first token."""

    def __init__(self, identity: Identity, call: Call) -> None:
        self._frames = responses.frames(identity, call)
        self._endpoint = call.endpoint

    def begin(self) -> bytes:
        return b""

    def event(self, event: Event) -> bytes:
        return self._frames.event(event)

    def end(self, outcome: Outcome, body: bytes) -> bytes:
        return self._frames.end(outcome.usage, body)

    def failed(self, error: APIError, status: JobStatus | None = None) -> bytes:
        return error_forms.stream_error(self._endpoint, error)
