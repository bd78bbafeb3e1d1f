"""Chat and text completions in OpenAI's form: the body, which is stored and served as these bytes, and the frames
of a stream, which a gateway builds from the same choices."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from tasks.call import Call
from tasks.identity import CHAT, Identity, StoredChoice, frame, usage_of
from tasks.output import Output
from tasks.stream import Event

DONE = b"data: [DONE]\n\n"


def generated(identity: Identity, call: Call, outputs: Sequence[Output]) -> bytes:
    """A chat completion or text completion."""
    is_chat = identity.endpoint == CHAT
    choices = [_choice(is_chat, call, index, output) for index, output in enumerate(outputs)]
    kind = "chat.completion" if is_chat else "text_completion"
    return orjson.dumps({**identity.head(kind), "choices": choices, "usage": usage_of(call, outputs)})


def _choice(is_chat: bool, call: Call, index: int, output: Output) -> dict[str, Any]:
    head = {"index": index, "finish_reason": output.finish_reason}
    logprobs = output.logprobs if call.params.get("logprobs") is not None else None
    if is_chat:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {**head, "message": message, "logprobs": _chat_logprobs(logprobs)}
    prefix = echoed(call, index)
    return {**head, "text": prefix + output.text, "logprobs": _completion_logprobs(logprobs)}


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
        self._call = call
        self._is_chat = identity.endpoint == CHAT
        self._head = identity.head("chat.completion.chunk" if self._is_chat else "text_completion")
        self._wants_logprobs = call.params.get("logprobs") is not None
        self._started: set[int] = set()
        self._lengths: dict[int, int] = {}

    def chunk(self, choice: int, text: str, logprobs: list[dict[str, Any]], finish_reason: str | None,
              seq: int | None = None) -> bytes:  # fmt: skip
        """One piece of one choice; `seq` becomes the event's id, by which a client resumes."""
        entries = logprobs if self._wants_logprobs else None
        body: dict[str, Any] = {"index": choice, "finish_reason": finish_reason}
        if self._is_chat:
            delta: dict[str, Any] = {"content": text} if text or finish_reason is None else {}
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
                entries = (choice.get("logprobs") or {}).get("content") or []
                yield self.chunk(index, choice["message"]["content"], entries, reason)
                continue
            self._started.add(index)  # the stored text has the echoed prompt in front already
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
        text, entries = choice["message"]["content"], (logprobs or {}).get("content") or []
    else:
        text = choice["text"].removeprefix(echoed(call, index))
        entries = _entries(logprobs) if logprobs else []
    return StoredChoice(index, text, choice["finish_reason"], entries)


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
