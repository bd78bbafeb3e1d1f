"""Chat and text completions in OpenAI's form: the body, which is stored and served as these bytes, and the frames
of a stream, which a gateway builds from the same choices."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from tasks import tool_calls
from tasks.call import Call
from tasks.identity import COMPLETIONS, Identity, StoredChoice, frame, usage_of
from tasks.output import Output
from tasks.stream import Event
from tasks.tool_calls import ToolCall

DONE = b"data: [DONE]\n\n"


def generated(identity: Identity, call: Call, outputs: Sequence[Output]) -> bytes:
    """A chat completion or text completion."""
    choices = [_choice(identity, call, index, output) for index, output in enumerate(outputs)]
    kind = "chat.completion" if identity.endpoint != COMPLETIONS else "text_completion"
    return orjson.dumps({**_head(identity, call, kind), "choices": choices, "usage": usage_of(call, outputs)})


def _head(identity: Identity, call: Call, kind: str) -> dict[str, Any]:
    tier = call.service_tier
    return identity.head(kind) if tier is None else {**identity.head(kind), "service_tier": tier}


def _choice(identity: Identity, call: Call, index: int, output: Output) -> dict[str, Any]:
    is_chat = identity.endpoint != COMPLETIONS
    head = {"index": index, "finish_reason": output.finish_reason}
    logprobs = output.logprobs if call.params.get("logprobs") is not None else None
    if is_chat:
        return {**head, **_message(identity, call, index, output.text), "logprobs": _chat_logprobs(logprobs)}
    prefix = echoed(call, index)
    return {**head, "text": prefix + output.text, "logprobs": _completion_logprobs(logprobs)}


def _message(identity: Identity, call: Call, index: int, text: str) -> dict[str, Any]:
    """The message, and what a tool call changes about how it ended."""
    content, calls = tool_calls.of(call, text)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if not calls:
        return {"message": message}
    message |= {"content": content or None, "tool_calls": _tool_calls(identity, index, calls)}
    return {"message": message, "finish_reason": "tool_calls"}


def _tool_calls(identity: Identity, choice: int, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [
        {
            "id": tool_calls.call_id(identity, choice, number),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments_json},
        }
        for number, call in enumerate(calls)
    ]


def echoed(call: Call, index: int) -> str:
    """The prompt that a completion repeats in front of its text, where that was asked for."""
    return str(call.inputs[index // call.n]) if call.format.get("echo") else ""


def _chat_logprobs(entries: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    return None if entries is None else {"content": entries, "refusal": None}


def _completion_logprobs(entries: list[dict[str, Any]] | None, offset: int = 0) -> dict[str, Any] | None:
    if entries is None:
        return None
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
        "text_offset": offsets,
    }


class Frames:
    """The server-sent events of one generation stream, from its first chunk to `[DONE]`."""

    def __init__(self, identity: Identity, call: Call) -> None:
        self._identity, self._call = identity, call
        self._is_chat = identity.endpoint != COMPLETIONS
        self._head = _head(identity, call, "chat.completion.chunk" if self._is_chat else "text_completion")
        self._wants_logprobs = call.params.get("logprobs") is not None
        self._started: set[int] = set()
        self._lengths: dict[int, int] = {}
        self._visible: defaultdict[int, tool_calls.Visible] | None = None
        if call.format.get("tools"):
            self._visible = defaultdict(lambda: tool_calls.Visible(call))

    def chunk(self, choice: int, text: str, logprobs: list[dict[str, Any]], finish_reason: str | None,
              seq: int | None = None) -> bytes:  # fmt: skip
        """One piece of one choice; `seq` becomes the event's id, by which a client resumes."""
        entries = logprobs if self._wants_logprobs else None
        body: dict[str, Any] = {"index": choice, "finish_reason": finish_reason}
        if self._is_chat:
            delta: dict[str, Any] = {"content": text} if text or finish_reason is None else {}
            if self._visible is not None:
                delta = self._delta(choice, self._visible[choice], text, is_last=finish_reason is not None)
                body["finish_reason"] = "tool_calls" if "tool_calls" in delta else finish_reason
            if choice not in self._started:
                delta = {"role": "assistant", **delta}
            body |= {"delta": delta, "logprobs": _chat_logprobs(entries)}
        else:
            if choice not in self._started:
                text = echoed(self._call, choice) + text
            offset = self._lengths.get(choice, 0)
            self._lengths[choice] = offset + len(text)
            body |= {"text": text, "logprobs": _completion_logprobs(entries, offset)}
        self._started.add(choice)
        extra = {"usage": None} if self._call.include_usage else {}
        return frame({**self._head, "choices": [body], **extra}, seq)

    def _delta(self, choice: int, visible: tool_calls.Visible, text: str, *, is_last: bool) -> dict[str, Any]:
        """Where the model may call tools: what shows of its text, and at the end its calls, each whole."""
        shown = visible.push(text)
        if not is_last:
            return {"content": shown} if shown else {}
        rest, calls = visible.finish()
        delta: dict[str, Any] = {"content": shown + rest} if shown + rest else {}
        if calls:
            spelled = _tool_calls(self._identity, choice, calls)
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(spelled)]
        return delta

    def event(self, event: Event) -> bytes:
        """An event's frame, under its number."""
        assert event.piece is not None
        piece = event.piece
        return self.chunk(event.choice, piece.text, piece.logprobs, piece.finish_reason, event.seq)

    def end(self, usage: Mapping[str, int] | None, body: bytes) -> bytes:
        """The usage chunk, where it was asked for, and the end."""
        tail = frame({**self._head, "choices": [], "usage": usage}) if self._call.include_usage else b""
        return tail + DONE

    def replay(self, body: dict[str, Any]) -> Iterator[bytes]:
        """A finished answer as a stream: one piece a choice."""
        for choice in body["choices"]:
            index, reason = choice["index"], choice["finish_reason"]
            if self._is_chat:
                known = _stored(self._call, choice)
                yield self.chunk(index, known.text, known.logprobs, known.finish_reason)
                continue
            stored = {"index": index, "finish_reason": reason, "text": choice["text"], "logprobs": choice["logprobs"]}
            extra = {"usage": None} if self._call.include_usage else {}
            yield frame({**self._head, "choices": [stored], **extra})
        yield self.end(body["usage"], b"")


def frames(identity: Identity, call: Call) -> Frames:
    """The stream of a chat or text completion."""
    return Frames(identity, call)


def stored(call: Call, body: dict[str, Any]) -> list[StoredChoice]:
    """The choices of a body."""
    return [_stored(call, choice) for choice in body["choices"]]


def _stored(call: Call, choice: dict[str, Any]) -> StoredChoice:
    index, logprobs = choice["index"], choice.get("logprobs")
    if "message" in choice:
        text, entries = _generated_text(choice["message"]), (logprobs or {}).get("content") or []
    else:
        text = choice["text"].removeprefix(echoed(call, index))
        entries = _entries(logprobs) if logprobs else []
    reason = choice["finish_reason"]
    return StoredChoice(index, text, "stop" if reason == "tool_calls" else reason, entries)


def _generated_text(message: dict[str, Any]) -> str:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = [ToolCall(one["name"], orjson.loads(one["arguments"])) for one in functions]
    return tool_calls.join(message["content"] or "", calls)


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
