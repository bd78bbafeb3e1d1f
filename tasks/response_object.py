"""OpenAI's response object and its stream, made from a job like any other.

A worker stores the answer in the form of a chat completion; a gateway shows it as a response. Everything
here is a function of the stored call, the stored answer and the events' numbers, so that a response looks
the same from every gateway, live or years later, and its stream can be asked for again from any event on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tasks.call import Call
from tasks.identity import Identity
from tasks.stream import Event

JSON = dict[str, Any]

_INVALID = {"invalid_prompt", "context_length_exceeded", "invalid_request"}
_STATUS = {"queued": "queued", "running": "in_progress", "cancelled": "cancelled"}


@dataclass(frozen=True, slots=True)
class Origin:
    """What every state of one response shows."""

    identity: Identity
    call: Call
    metadata: Mapping[str, str]

    @property
    def asked(self) -> JSON:
        """What the request named, as `api.schemas.responses` keeps it with the call."""
        found: JSON = self.call.format["response"]
        return found

    @property
    def is_background(self) -> bool:
        return bool(self.asked["background"])

    @property
    def is_stored(self) -> bool:
        return bool(self.asked["store"])

    @property
    def item_id(self) -> str:
        return f"msg_{self.identity.job_id.hex}"


def pending(origin: Origin, status: str) -> JSON:
    """A response whose job has no answer (yet); `status` is the job's: queued, running or cancelled."""
    return _object(origin, _STATUS[status])


def failed(origin: Origin, error: Mapping[str, Any]) -> JSON:
    """A response whose job failed or expired, with the job's error."""
    code = "invalid_prompt" if error.get("code") in _INVALID else "server_error"
    told = {"code": code, "message": error.get("message") or "The response could not be generated."}
    return _object(origin, "failed") | {"error": told}


def answered(origin: Origin, stored: bytes, finished: int | None) -> JSON:
    """A response whose job succeeded: completed, or incomplete where the token limit ended it."""
    body = orjson.loads(stored)
    choice = body["choices"][0]
    entries = (choice["logprobs"] or {}).get("content")
    return _answered(origin, choice["message"]["content"], choice["finish_reason"], entries, body["usage"], finished)


def _answered(origin: Origin, text: str, reason: str | None, logprobs: Sequence[JSON] | None,
              usage: Mapping[str, int], finished: int | None) -> JSON:  # fmt: skip
    is_whole = reason != "length"
    made = _object(origin, "completed" if is_whole else "incomplete")
    if not is_whole:
        made["incomplete_details"] = {"reason": "max_output_tokens"}
    made["output"] = [_item(origin, made["status"], [_part(text, logprobs or [])])]
    made["usage"] = {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
    made["completed_at"] = finished
    return made


def _object(origin: Origin, status: str) -> JSON:
    asked, identity = origin.asked, origin.identity
    return {
        "id": identity.id,
        "object": "response",
        "created_at": identity.created,
        "status": status,
        "background": asked["background"],
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.get("instructions"),
        "max_output_tokens": asked["max_output_tokens"],
        "metadata": dict(origin.metadata),
        "model": identity.model,
        "output": [],
        "parallel_tool_calls": True,
        "previous_response_id": asked.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": asked["store"],
        "temperature": asked["temperature"],
        "text": {"format": asked.get("text_format", {"type": "text"})},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": asked["top_logprobs"],
        "top_p": asked["top_p"],
        "truncation": "disabled",
        "usage": None,
    }


def _item(origin: Origin, status: str, content: Sequence[JSON]) -> JSON:
    return {"id": origin.item_id, "type": "message", "status": status, "role": "assistant", "content": list(content)}


def _part(text: str, logprobs: Sequence[JSON]) -> JSON:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def input_items(origin: Origin) -> list[JSON]:
    """What the response was made from, in the order of the conversation, earlier responses' turns included."""
    asked = origin.asked
    messages = [*asked.get("context", []), *asked.get("input", [])]
    return [_input_item(origin, number, message) for number, message in enumerate(messages)]


def _input_item(origin: Origin, number: int, message: Mapping[str, str]) -> JSON:
    role, text = message["role"], message["content"]
    part = _part(text, []) if role == "assistant" else {"type": "input_text", "text": text}
    return {
        "id": f"msg_{origin.identity.job_id.hex}{number:04x}",
        "type": "message",
        "status": "completed",
        "role": role,
        "content": [part],
    }


class ResponseFrames:
    """The server-sent events of one response. Event n of the run is number n plus a constant, so numbers
    stay what they are across attempts, gateways and replays."""

    def __init__(self, origin: Origin, seen: int = -1) -> None:
        """`seen` is the last number that the reader has."""
        self._origin = origin
        self._seen = seen
        self._opening = 3 if origin.is_background else 2
        self._last = -1
        self._has_begun = False
        self._text = ""
        self._logprobs: list[JSON] = []
        self._reason: str | None = None

    @property
    def first(self) -> int:
        """The number of the run's first event, less one."""
        return self._opening + 1

    def begin(self) -> bytes:
        """What is known before the first token."""
        queued, running = (pending(self._origin, status) for status in ("queued", "running"))
        if not self._origin.is_background:
            return self._frames([(0, "response.created", {"response": running}),
                                 (1, "response.in_progress", {"response": running})])  # fmt: skip
        return self._frames([(0, "response.created", {"response": queued}),
                             (1, "response.queued", {"response": queued})])  # fmt: skip

    def event(self, event: Event) -> bytes:
        """One delta, behind the opening of the message where it is the first."""
        assert event.piece is not None
        piece = event.piece
        opening = b"" if self._has_begun else self._frames(self._open())
        self._has_begun = True
        self._text += piece.text
        self._logprobs += piece.logprobs
        self._reason = piece.finish_reason
        entries = [{name: entry[name] for name in ("token", "logprob", "top_logprobs")} for entry in piece.logprobs]
        delta = {**self._where(), "delta": piece.text, "logprobs": entries}
        return opening + self._frames([(self.first + event.seq, "response.output_text.delta", delta)])

    def end(self, usage: Mapping[str, int] | None, finished: int | None) -> bytes:
        """The end of the message and of the response."""
        assert usage is not None
        logprobs = self._logprobs
        whole = _answered(self._origin, self._text, self._reason, logprobs, usage, finished)
        item = whole["output"][0]
        bodies = [
            ("response.output_text.done", {**self._where(), "text": self._text, "logprobs": logprobs}),
            ("response.content_part.done", {**self._where(), "part": item["content"][0]}),
            ("response.output_item.done", {"output_index": 0, "item": item}),
            (f"response.{whole['status']}", {"response": whole}),
        ]
        return self._frames([(number, name, body) for number, (name, body) in enumerate(bodies, self._last + 1)])

    def failed(self, error: Mapping[str, Any], status: str | None = None) -> bytes:
        """The end of a response that has no answer; without the job's final `status`, only of this stream."""
        number = max(self._last, self._seen) + 1
        if status is None:
            told = {"code": error["code"], "message": error["message"], "param": error["param"]}
            return self._frames([(number, "error", told)])
        shown = pending(self._origin, status) if status == "cancelled" else failed(self._origin, error)
        return self._frames([(number, "response.failed", {"response": shown})])

    def _open(self) -> Iterator[tuple[int, str, JSON]]:
        if self._origin.is_background:
            yield 2, "response.in_progress", {"response": pending(self._origin, "running")}
        item = _item(self._origin, "in_progress", [])
        yield self._opening, "response.output_item.added", {"output_index": 0, "item": item}
        yield self._opening + 1, "response.content_part.added", {**self._where(), "part": _part("", [])}

    def _where(self) -> JSON:
        return {"item_id": self._origin.item_id, "output_index": 0, "content_index": 0}

    def _frames(self, wanted: "Iterator[tuple[int, str, JSON]] | Sequence[tuple[int, str, JSON]]") -> bytes:
        """Those that the reader does not have yet."""
        made = b""
        for number, name, body in wanted:
            self._last = number
            if number > self._seen:
                data = orjson.dumps({"type": name, "sequence_number": number, **body})
                made += b"event: %s\nid: %d\ndata: %s\n\n" % (name.encode(), number, data)
        return made
