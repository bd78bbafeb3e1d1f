"""OpenAI's response object and its stream, made from a job like any other.

A worker stores the answer in the form of a chat completion; a gateway shows it as a response. Everything
here is a function of the stored call, the stored answer and the events' numbers, so that a response looks
the same from every gateway, live or years later, and its stream can be asked for again from any event on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tasks import tool_calls
from tasks.call import Call
from tasks.identity import Identity
from tasks.output import Piece
from tasks.stream import Event
from tasks.tool_calls import ToolCall, Visible

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
    message = choice["message"]
    calls = [(one["function"]["name"], one["function"]["arguments"]) for one in message.get("tool_calls", ())]
    entries = (choice["logprobs"] or {}).get("content") or []
    items = _items(origin, _ending(choice["finish_reason"]), message["content"] or "", entries, calls)
    return _answered(origin, items, body["usage"], finished)


def _ending(reason: str | None) -> str:
    return "incomplete" if reason == "length" else "completed"


def _answered(origin: Origin, items: Sequence[JSON], usage: Mapping[str, int], finished: int | None) -> JSON:
    made = _object(origin, items[0]["status"])
    if made["status"] == "incomplete":
        made["incomplete_details"] = {"reason": "max_output_tokens"}
    made["output"] = list(items)
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
        "parallel_tool_calls": asked.get("parallel_tool_calls", True),
        "previous_response_id": asked.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": asked["store"],
        "temperature": asked["temperature"],
        "text": {"format": asked.get("text_format", {"type": "text"})},
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": asked.get("tools", []),
        "top_logprobs": asked["top_logprobs"],
        "top_p": asked["top_p"],
        "truncation": "disabled",
        "usage": None,
    }


def _items(origin: Origin, status: str, text: str, logprobs: Sequence[JSON], calls: Sequence[tuple[str, str]]
           ) -> list[JSON]:  # fmt: skip
    """The message, which is there also where it is empty (a stream opens it before it knows), and each call's name and
    arguments as an item of its own."""
    message = _message(origin, status, [_part(text, logprobs)])
    return [message, *(_call(origin, number, *call) for number, call in enumerate(calls))]


def _message(origin: Origin, status: str, content: Sequence[JSON]) -> JSON:
    return {"id": origin.item_id, "type": "message", "status": status, "role": "assistant", "content": list(content)}


def _call(origin: Origin, number: int, name: str, arguments: str) -> JSON:
    return {
        "id": f"fc_{origin.identity.job_id.hex}{number:02x}",
        "type": "function_call",
        "status": "completed",
        "call_id": tool_calls.call_id(origin.identity, 0, number),
        "name": name,
        "arguments": arguments,
    }


def _part(text: str, logprobs: Sequence[JSON]) -> JSON:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def input_items(origin: Origin) -> list[JSON]:
    """What the response was made from, in the order of the conversation, earlier responses' turns included."""
    asked = origin.asked
    messages = [*asked.get("context", []), *asked.get("input", [])]
    items = [item for message in messages for item in _input_items(message)]
    return [
        {"id": f"{_PREFIXES[item['type']]}{origin.identity.job_id.hex}{number:04x}", "status": "completed", **item}
        for number, item in enumerate(items)
    ]


_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_"}


def _input_items(message: JSON) -> Iterator[JSON]:
    """The items that `api.schemas.response_items` made a chat's message of."""
    role, text, calls = message["role"], message["content"], message.get("tool_calls", ())
    if role == "tool":
        yield {"type": "function_call_output", "call_id": message["tool_call_id"], "output": text}
        return
    if text or not calls:
        part = _part(text, []) if role == "assistant" else {"type": "input_text", "text": text}
        yield {"type": "message", "role": role, "content": [part]}
    for call in calls:
        arguments = orjson.dumps(call["function"]["arguments"]).decode()
        name = call["function"]["name"]
        yield {"type": "function_call", "call_id": call["id"], "name": name, "arguments": arguments}


def turn_of(output: Sequence[JSON]) -> JSON:
    """An answer's items as the turn that a later response goes on from."""
    message, *calls = output
    made: JSON = {"role": "assistant", "content": message["content"][0]["text"]}
    if calls:
        made["tool_calls"] = [
            {
                "id": call["call_id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": orjson.loads(call["arguments"])},
            }
            for call in calls
        ]
    return made


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
        self._visible = Visible(origin.call) if origin.call.format.get("tools") else None
        self._calls: list[ToolCall] = []
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
        shown = self._shown(piece)
        self._text += shown
        self._logprobs += piece.logprobs
        self._reason = piece.finish_reason
        entries = [{name: entry[name] for name in ("token", "logprob", "top_logprobs")} for entry in piece.logprobs]
        delta = {**self._where(), "delta": shown, "logprobs": entries}
        return opening + self._frames([(self.first + event.seq, "response.output_text.delta", delta)])

    def end(self, usage: Mapping[str, int] | None, finished: int | None) -> bytes:
        """The end of the message, the calls, each whole, and the end of the response."""
        assert usage is not None
        logprobs = self._logprobs
        status = "completed" if self._calls else _ending(self._reason)
        calls = [(call.name, call.arguments_json) for call in self._calls]
        message, *others = _items(self._origin, status, self._text, logprobs, calls)
        whole = _answered(self._origin, [message, *others], usage, finished)
        bodies = [
            ("response.output_text.done", {**self._where(), "text": self._text, "logprobs": logprobs}),
            ("response.content_part.done", {**self._where(), "part": message["content"][0]}),
            ("response.output_item.done", {"output_index": 0, "item": message}),
            *(event for index, call in enumerate(others, 1) for event in _call_events(index, call)),
            (f"response.{status}", {"response": whole}),
        ]
        return self._frames([(number, name, body) for number, (name, body) in enumerate(bodies, self._last + 1)])

    def _shown(self, piece: Piece) -> str:
        """What shows of the piece. One that shows nothing has its delta all the same: numbers have no gaps."""
        if self._visible is None:
            return piece.text
        shown = self._visible.push(piece.text)
        if piece.finish_reason is None:
            return shown
        rest, self._calls = self._visible.finish()
        return shown + rest

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
        item = _message(self._origin, "in_progress", [])
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


def _call_events(index: int, call: JSON) -> Iterator[tuple[str, JSON]]:
    arguments = call["arguments"]
    where = {"item_id": call["id"], "output_index": index}
    begun = {**call, "status": "in_progress", "arguments": ""}
    yield "response.output_item.added", {"output_index": index, "item": begun}
    yield "response.function_call_arguments.delta", {**where, "delta": arguments}
    yield "response.function_call_arguments.done", {**where, "name": call["name"], "arguments": arguments}
    yield "response.output_item.done", {"output_index": index, "item": call}
