"""The contract between Switchyard and a model runtime.

A worker process owns one `Backend`, which holds every model that the catalog gives it. The worker
calls it from one asyncio loop, many calls at a time; the backend merges them into shared forward
passes. Inputs are token ids: the gateway has tokenised, counted and bounded them already.

Importing this package, or any backend's module, must not import torch, transformers or vllm:
the gateway reads `capabilities` from the class. The runtime is imported in `start`.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from catalog import BackendSpec, Task

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["stop", "length", "abort"]


class BackendError(Exception):
    """An attempt failed; another attempt may succeed."""


class InvalidCall(BackendError):
    """The call can never succeed on this backend; retrying is pointless. The message is shown to the caller."""


class BackendDead(BackendError):
    """The runtime is gone and cannot be revived in this process: give the jobs back and exit."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can honour. A call that needs more is not routed to it."""

    tasks: frozenset[Task]
    parameters: frozenset[str] = frozenset()
    """Names of the `SamplingParams` fields it honours beyond max_tokens."""
    max_logprobs: int = 0
    """Most alternatives per position. 0: none."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample one sequence. Field names are vLLM's; defaults mean "no effect"."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Presence and frequency count generated tokens only, repetition also the prompt's (as vLLM)."""
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    """Alternatives to report per generated token; 0 reports the sampled token's alone. Taken from the
    log-softmax of the raw logits, before temperature and penalties, but without what the grammar forbids."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    grammar: str | None = None
    """What the text must look like, in llguidance's Lark form or in GBNF. Checked by the gateway; a sequence that
    does not reach the grammar's end within max_tokens is cut off in the middle of it."""


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One sequence to generate."""

    request_id: str
    """Unique among the calls in flight."""
    model: str
    prompt_token_ids: list[int]
    params: SamplingParams
    is_streaming: bool = False
    """False permits one chunk at the end: it saves a wake-up per token."""
    resumed_token_ids: tuple[int, ...] = ()
    """Tokens an earlier attempt already produced: continue after them, count them against max_tokens and
    penalties, advance the grammar over them, never yield them again."""
    options: Mapping[str, str | int | float] = field(default_factory=dict)
    """Only `echo` reads these: its delays and failures."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token's log probability and its best alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of output. The last one of a sequence, and only that, has a finish_reason."""

    token_ids: tuple[int, ...]
    """Every generated token in order, a closing end-of-sequence token included (it counts as usage)."""
    text: str
    """What these tokens add to the text; special tokens removed. Never ends inside a character: bytes of
    an unfinished one wait for the next chunk, and become U+FFFD only at the end."""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class EncodeCall:
    """Texts for an encoder, as token ids with the model's special tokens in place."""

    request_id: str
    model: str
    inputs: list[list[int]]
    type_ids: list[list[int]] | None = None
    """Segment ids of (query, document) pairs, for a cross-encoder."""
    dimensions: int | None = None
    """Embeddings only: keep this many leading dimensions and normalise again."""
    options: Mapping[str, str | int | float] = field(default_factory=dict)


class Backend(ABC):
    """One runtime with its models pinned in memory. All methods run on one asyncio loop."""

    capabilities: ClassVar[Capabilities]

    def __init__(self, spec: BackendSpec) -> None:
        self.spec = spec

    @abstractmethod
    async def start(self) -> None:
        """Load every model of the spec and warm up. May block the loop. Raises on failure."""

    @abstractmethod
    async def stop(self) -> None:
        """Free the runtime and every child process. Calls still running may end in any way."""

    def check_health(self) -> None:
        """Raise BackendDead once the runtime cannot serve again in this process. Cheap; called every second."""
        return

    @abstractmethod
    def num_steps(self) -> int:
        """A number that grows with every step of the runtime's work. While calls are running and it stands
        still, the runtime hangs."""

    def generate(self, call: GenerateCall) -> AsyncIterator[Chunk]:
        """Yield chunks until one has a finish_reason. Closing the iterator, or cancelling the task that
        reads it, takes the sequence out of the running batch before the next step."""
        raise InvalidCall(f"{self.spec.name} does not generate")

    async def embed(self, call: EncodeCall) -> "np.ndarray":
        """float32 [inputs, dimension], pooled and normalised as the model's own configuration says."""
        raise InvalidCall(f"{self.spec.name} does not embed")

    async def classify(self, call: EncodeCall) -> "np.ndarray":
        """float32 [inputs, labels], probabilities in the order of the model's labels."""
        raise InvalidCall(f"{self.spec.name} does not classify")

    async def rerank(self, call: EncodeCall) -> "np.ndarray":
        """float32 [documents], higher is more relevant.

        A cross-encoder gets one pair per document (type_ids set) and answers its sigmoid score. A
        bi-encoder gets the query as input 0 and the documents after it, and answers cosines.
        """
        raise InvalidCall(f"{self.spec.name} does not rerank")
