"""A call: a validated request on its way into a job, and the form in which the job keeps it.

The gateway makes it from the wire (`api.schemas`), the cache keys it, the router reads it, the ledger
stores it as JSON bytes, and the worker turns it into backend calls. It names no HTTP and no database.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from catalog import Task

VERSION = 1
"""Of the stored form and of the queue message. A worker parks what it does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What one job computes, independent of which backend runs it."""

    endpoint: str
    """The public path, e.g. "/v1/chat/completions"."""
    task: Task
    model: str
    """As requested until the router has chosen, then the chosen model's own name."""
    messages: list[dict[str, Any]] | None = None
    """Chat only: [{"role", "content"}, …], content parts already joined to text; some with `tool_calls` or
    `tool_call_id`."""
    inputs: list[str | list[int]] = field(default_factory=list)
    """Completion prompts; encoder texts; for rerank the query and then the documents."""
    n: int = 1
    max_tokens: int | None = None
    """None: the model's default, bounded by what its context leaves."""
    params: dict[str, Any] = field(default_factory=dict)
    """`backends.base.SamplingParams` fields that the request gave, max_tokens apart."""
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False
    format: dict[str, Any] = field(default_factory=dict)
    """What shapes the answer: encoding_format, dimensions, return_documents, top_n, top_logprobs, pairs, tools,
    constrained_by, …"""
    options: dict[str, str | int | float] = field(default_factory=dict)
    """Echo's delays and failures."""
    token_ids: list[list[int]] = field(default_factory=list)
    """One list per sequence to run, special tokens in place; filled by tokenising."""
    type_ids: list[list[int]] | None = None
    """Segment ids beside token_ids, for a cross-encoder's pairs."""

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def most_tokens(self) -> int:
        """What a tokenised call uses at most. A prompt that has n choices counts once."""
        generated = len(self.token_ids) * self.n * (self.max_tokens or 0) if self.task == "generate" else 0
        return self.prompt_tokens + generated

    @property
    def service_tier(self) -> str | None:
        """flex or priority, where the caller asked for one of them."""
        return self.format.get("service_tier")

    @property
    def constrained_by(self) -> str:
        """The parameter that says what the text must look like (`params["grammar"]`)."""
        return str(self.format.get("constrained_by", "grammar"))

    @property
    def num_queries(self) -> int:
        """Of a rerank call: its inputs are so many queries, and then the documents. Several queries have as many
        documents, one each."""
        return int(self.format.get("num_queries", 1))

    def canonical(self) -> dict[str, Any]:
        """Everything that can change the stored answer, and nothing that cannot (stream, include_usage)."""
        return {
            "endpoint": self.endpoint,
            "messages": self.messages,
            "inputs": self.inputs,
            "n": self.n,
            "max_tokens": self.max_tokens,
            "params": self.params,
            "stop": self.stop,
            "format": self.format,
            "options": self.options,
        }

    def without_text(self) -> "Call":
        """The form a job stores once tokenised: prompts (and the definitions of tools in them) live on as token
        ids alone, except where the answer repeats them (rerank's documents, completions' echo)."""
        keeps_inputs = self.format.get("return_documents") or self.format.get("echo")
        shape = {**self.format, "tools": True} if "tools" in self.format else self.format
        return replace(self, messages=None, inputs=self.inputs if keeps_inputs else [], format=shape)

    def encode(self) -> bytes:
        # orjson writes a dataclass natively; dataclasses.asdict would copy every token id (3 ms at 2,000).
        return orjson.dumps({"v": VERSION, "call": self}, option=orjson.OPT_NON_STR_KEYS)

    @classmethod
    def decode(cls, stored: bytes) -> "Call":
        """Raises ValueError for a version this code does not know."""
        fields = orjson.loads(stored)
        if fields.get("v") != VERSION:
            raise ValueError("unknown call version")
        return cls(**fields["call"])
