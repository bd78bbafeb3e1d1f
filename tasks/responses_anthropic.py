"""Anthropic's messages: the body, and the named events of a stream. One choice; content in blocks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from backends.base import FinishReason
from tasks import tool_calls
from tasks.call import Call
from tasks.identity import Identity, StoredChoice, frame, usage_of
from tasks.output import Output
from tasks.stream import Event
from tasks.tool_calls import ToolCall

_STOP_REASONS: Mapping[FinishReason, str] = {"stop": "end_turn", "length": "max_tokens", "abort": "end_turn"}


def generated(identity: Identity, call: Call, outputs: Sequence[Output]) -> bytes:
    """A message."""
    (output,) = outputs
    assert output.finish_reason is not None
    text, calls = tool_calls.of(call, output.text)
    reason = _STOP_REASONS[output.finish_reason]
    if output.matched_stop is not None:
        reason = "stop_sequence"
    usage = usage_of(call, outputs)
    body = {
        **_head(identity),
        "content": _blocks(identity, text, calls),
        "stop_reason": "tool_use" if calls else reason,
        "stop_sequence": None if calls else output.matched_stop,
        "usage": {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]},
    }
    return orjson.dumps(body)


def frames(identity: Identity, call: Call) -> "Frames":
    """The stream of a message."""
    return Frames(identity, call)


def stored(call: Call, body: dict[str, Any]) -> list[StoredChoice]:
    """The text of a body, with its tool calls as the model wrote them."""
    text = "".join(block["text"] for block in body["content"] if block["type"] == "text")
    calls = [ToolCall(block["name"], block["input"]) for block in body["content"] if block["type"] == "tool_use"]
    reason: FinishReason = "length" if body["stop_reason"] == "max_tokens" else "stop"
    return [StoredChoice(0, tool_calls.join(text, calls), reason, [])]


def _head(identity: Identity) -> dict[str, Any]:
    return {"id": identity.id, "type": "message", "role": "assistant", "model": identity.model}


def _blocks(identity: Identity, text: str, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not calls else []
    for number, call in enumerate(calls):
        blocks.append({
            "type": "tool_use", "id": _call_id(identity, number), "name": call.name, "input": call.arguments
        })  # fmt: skip
    return blocks


def _call_id(identity: Identity, number: int) -> str:
    return tool_calls.call_id(identity, 0, number).replace("call_", "toolu_")


class Frames:
    """From `message_start` to `message_stop`. Tool calls come whole, at the end."""

    def __init__(self, identity: Identity, call: Call) -> None:
        self._identity, self._call = identity, call
        self._visible = tool_calls.Visible(call) if call.format.get("tools") else None
        self._has_begun = self._has_text = False

    def event(self, event: Event) -> bytes:
        """The event's text, under its number, with the frames that must stand around it."""
        assert event.piece is not None
        shown, calls = event.piece.text, list[ToolCall]()
        is_last = event.piece.finish_reason is not None
        if self._visible is not None:
            shown = self._visible.push(shown)
            if is_last:
                rest, calls = self._visible.finish()
                shown += rest
        made = b"" if self._has_begun else self._begin()
        if (shown or (is_last and not calls)) and not self._has_text:
            self._has_text = True
            made += _text_start()
        # Every event has a frame, so that a client's ids have no gaps.
        made += _delta(0, {"type": "text_delta", "text": shown}, event.seq) if shown else _ping(event.seq)
        return made + self._close(calls) if is_last else made

    def end(self, usage: Mapping[str, int] | None, body: bytes) -> bytes:
        """Why it ended, which the stored answer knows."""
        return _end(orjson.loads(body))

    def replay(self, body: dict[str, Any]) -> Iterator[bytes]:
        """A finished message: one delta a block."""
        yield self._begin(body["usage"]["input_tokens"])
        for index, block in enumerate(body["content"]):
            if block["type"] == "text":
                self._has_text = True
                yield _text_start()
                yield _delta(0, {"type": "text_delta", "text": block["text"]})
                yield _stop(0)
            else:
                yield _tool_use(index, block)
        yield _end(body)

    def _begin(self, input_tokens: int | None = None) -> bytes:
        self._has_begun = True
        tokens = self._call.prompt_tokens if input_tokens is None else input_tokens
        usage = {"input_tokens": tokens, "output_tokens": 0}
        message = {**_head(self._identity), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return frame({"type": "message_start", "message": message}, name="message_start")

    def _close(self, calls: Sequence[ToolCall]) -> bytes:
        made = _stop(0) if self._has_text else b""
        blocks = _blocks(self._identity, "", calls) if calls else []
        return made + b"".join(_tool_use(index, block) for index, block in enumerate(blocks, self._has_text))


def _start(index: int, block: Mapping[str, Any]) -> bytes:
    return frame({"type": "content_block_start", "index": index, "content_block": block}, name="content_block_start")


def _text_start() -> bytes:
    return _start(0, {"type": "text", "text": ""}) + _ping()


def _delta(index: int, delta: Mapping[str, Any], seq: int | None = None) -> bytes:
    return frame({"type": "content_block_delta", "index": index, "delta": delta}, seq, "content_block_delta")


def _stop(index: int) -> bytes:
    return frame({"type": "content_block_stop", "index": index}, name="content_block_stop")


def _ping(seq: int | None = None) -> bytes:
    return frame({"type": "ping"}, seq, "ping")


def _tool_use(index: int, block: Mapping[str, Any]) -> bytes:
    delta = {"type": "input_json_delta", "partial_json": orjson.dumps(block["input"]).decode()}
    return _start(index, {**block, "input": {}}) + _delta(index, delta) + _stop(index)


def _end(body: Mapping[str, Any]) -> bytes:
    delta = {"stop_reason": body["stop_reason"], "stop_sequence": body["stop_sequence"]}
    last = frame({"type": "message_delta", "delta": delta, "usage": body["usage"]}, name="message_delta")
    return last + frame({"type": "message_stop"}, name="message_stop")
