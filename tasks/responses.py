"""The public form of every answer: one final body per job, and the frames of a stream.

The worker builds the body, which is stored and served as these bytes. A gateway builds the frames of a
live stream from the same choices, and those of a cached stream from the stored body.
"""

import base64
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from tasks.call import Call
from tasks.output import Output
from tasks.stream import Event

if TYPE_CHECKING:
    import numpy as np

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
"""Stored in the form of a chat completion, and shown as `tasks.response_object` says."""
DONE = b"data: [DONE]\n\n"

_ID_PREFIX = {
    CHAT: "chatcmpl-",
    COMPLETIONS: "cmpl-",
    RESPONSES: "resp_",
    "/v1/embeddings": "embd-",
    "/v1/classify": "classify-",
    "/v1/rerank": "rerank-",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """What every piece of one answer carries."""

    endpoint: str
    job_id: uuid.UUID
    model: str
    created: int
    """Unix seconds of the job's creation."""

    @property
    def id(self) -> str:
        return _ID_PREFIX[self.endpoint] + self.job_id.hex


def usage_of(call: Call, outputs: Sequence[Output] = ()) -> dict[str, int]:
    """Tokens in OpenAI's form. A prompt that has n choices counts once."""
    prompt = call.prompt_tokens
    if call.task != "generate":
        return {"prompt_tokens": prompt, "total_tokens": prompt}
    completion = sum(len(output.token_ids) for output in outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def generated(identity: Identity, call: Call, outputs: Sequence[Output]) -> bytes:
    """A chat completion or text completion."""
    is_chat = identity.endpoint != COMPLETIONS
    choices = [_choice(is_chat, call, index, output) for index, output in enumerate(outputs)]
    kind = "chat.completion" if is_chat else "text_completion"
    return orjson.dumps({**_head(identity, kind), "choices": choices, "usage": usage_of(call, outputs)})


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


def embedded(identity: Identity, call: Call, vectors: "np.ndarray") -> bytes:
    """An embeddings list; base64 is little-endian float32."""
    if call.format.get("encoding_format") == "base64":
        values: list[Any] = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
    else:
        values = list(vectors)
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    body = {"object": "list", "data": data, "model": identity.model, "usage": usage_of(call)}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def classified(identity: Identity, call: Call, probabilities: "np.ndarray", labels: Sequence[str]) -> bytes:
    """vLLM's classify shape: the best label and every probability, in the order of the model's labels."""
    data = [
        {"index": index, "label": labels[int(row.argmax())], "probs": row, "num_classes": len(row)}
        for index, row in enumerate(probabilities)
    ]
    body = {**_head(identity, "list"), "data": data, "usage": usage_of(call)}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def reranked(identity: Identity, call: Call, scores: "np.ndarray") -> bytes:
    """Documents by falling relevance; `top_n` of them."""
    order = sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))
    results = []
    for index in order[: call.format.get("top_n") or None]:
        result: dict[str, Any] = {"index": index, "relevance_score": float(scores[index])}
        if call.format.get("return_documents"):
            result["document"] = {"text": call.inputs[index + 1]}
        results.append(result)
    return orjson.dumps({"id": identity.id, "model": identity.model, "usage": usage_of(call), "results": results})


def _head(identity: Identity, kind: str) -> dict[str, Any]:
    return {"id": identity.id, "object": kind, "created": identity.created, "model": identity.model}


class StreamFrames(Protocol):
    """How a job's stream looks on the wire."""

    def begin(self) -> bytes: ...

    def event(self, event: Event) -> bytes: ...

    def end(self, usage: Mapping[str, int] | None, finished: int | None) -> bytes: ...

    def failed(self, error: Mapping[str, Any], status: str | None = None) -> bytes:
        """`status` is the job's final one; None where only this stream cannot go on."""


class Frames:
    """The server-sent events of one generation stream, from its first chunk to `[DONE]`."""

    def __init__(self, identity: Identity, call: Call) -> None:
        self._call = call
        self._is_chat = identity.endpoint == CHAT
        self._head = _head(identity, "chat.completion.chunk" if self._is_chat else "text_completion")
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

    def begin(self) -> bytes:
        """What is known before the first token: nothing."""
        return b""

    def event(self, event: Event) -> bytes:
        """An event's frame, under its number."""
        assert event.piece is not None
        piece = event.piece
        return self.chunk(event.choice, piece.text, piece.logprobs, piece.finish_reason, event.seq)

    def end(self, usage: Mapping[str, int] | None, finished: int | None = None) -> bytes:
        """The usage chunk, where it was asked for, and the end."""
        tail = frame({**self._head, "choices": [], "usage": usage}) if self._call.include_usage else b""
        return tail + DONE

    def failed(self, error: Mapping[str, Any], status: str | None = None) -> bytes:
        """The event that ends a stream badly. No `[DONE]` follows it."""
        return frame({"error": error})

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
        yield self.end(body["usage"])


def frame(body: dict[str, Any], seq: int | None = None) -> bytes:
    """One server-sent event."""
    identifier = b"" if seq is None else b"id: %d\n" % seq
    return identifier + b"data: " + orjson.dumps(body) + b"\n\n"
