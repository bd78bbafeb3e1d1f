"""What every public answer carries, whatever its family: id, model, time, and the count of its tokens."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from backends.base import FinishReason
from tasks.call import Call
from tasks.output import Output

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
"""Stored in the form of a chat completion, and shown as `tasks.response_object` says."""

_ID_PREFIX = {
    CHAT: "chatcmpl-",
    COMPLETIONS: "cmpl-",
    MESSAGES: "msg_",
    RESPONSES: "resp_",
    "/v1/embeddings": "embd-",
    "/v1/classify": "classify-",
    "/v1/rerank": "rerank-",
    "/v1/score": "score-",
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

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that OpenAI's and vLLM's objects begin with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True, slots=True)
class StoredChoice:
    """One choice as it was generated, read back from a stored answer."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: list[dict[str, Any]]


def usage_of(call: Call, outputs: Sequence[Output] = ()) -> dict[str, int]:
    """Tokens in OpenAI's form. A prompt that has n choices counts once."""
    prompt = call.prompt_tokens
    if call.task != "generate":
        return {"prompt_tokens": prompt, "total_tokens": prompt}
    completion = sum(len(output.token_ids) for output in outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def frame(body: dict[str, Any], seq: int | None = None, name: str | None = None) -> bytes:
    """One server-sent event; `seq` is the id by which a client resumes."""
    identifier = b"" if seq is None else b"id: %d\n" % seq
    event = b"" if name is None else b"event: %s\n" % name.encode()
    return identifier + event + b"data: " + orjson.dumps(body) + b"\n\n"
