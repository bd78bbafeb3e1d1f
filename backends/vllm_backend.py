"""Text generation with vLLM's `AsyncLLM`, in this process; its HTTP server is never started.

Every call becomes one concurrent `generate`, so vLLM's own scheduler batches them continuously. Each
model of the spec has an engine of its own (a process, and one more per device), tied to this one by
`backends.vllm_orphans`. The same file serves CPUs and GPUs: the installed vllm package decides.

Options, under their vLLM engine-argument names unless said otherwise:

- dtype (auto), quantization, kv_cache_dtype, load_format
- max_num_seqs, max_num_batched_tokens, enable_prefix_caching, enable_chunked_prefill, block_size: as vLLM chooses
- kv_cache_memory_gib: memory of the KV cache per device and model (vLLM's kv_cache_memory_bytes).
  Unset: on a CPU 4; on a GPU what gpu_memory_utilization (0.92) leaves after weights and activations.
  Several models on one GPU need one of the two.
- tensor_parallel_size (1), pipeline_parallel_size (1)
- enforce_eager: skip torch.compile and CUDA graphs. Unset: true on a CPU, false on a GPU.
- omp_threads_bind (CPU only): VLLM_CPU_OMP_THREADS_BIND, default "nobind".
- async_scheduling, attention_backend, speculative_config, compilation_config, seed
- disable_log_stats (true): false registers vLLM's own `vllm:*` metrics in prometheus_client's registry.

max_model_len is the model's context_length from the catalog. Environment variables of vLLM are
honoured; `start` sets only those that are unset.
"""

import asyncio
import multiprocessing
import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenizers import Tokenizer

from backends import vllm_grammars, vllm_orphans
from backends.base import (
    Backend,
    BackendDead,
    BackendError,
    Capabilities,
    Chunk,
    FinishReason,
    GenerateCall,
    InvalidCall,
    SamplingParams,
    TokenLogprob,
)
from backends.text import Detokenizer
from catalog import BackendSpec, CatalogError, ModelSpec

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vllm import RequestOutput
    from vllm import SamplingParams as EngineParams
    from vllm.config import VllmConfig
    from vllm.inputs import TokensInput
    from vllm.v1.engine.async_llm import AsyncLLM

_ENGINE_OPTIONS = frozenset(
    {
        "async_scheduling",
        "attention_backend",
        "block_size",
        "compilation_config",
        "disable_log_stats",
        "dtype",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_dtype",
        "load_format",
        "max_num_batched_tokens",
        "max_num_seqs",
        "pipeline_parallel_size",
        "quantization",
        "seed",
        "speculative_config",
        "tensor_parallel_size",
    }
)
_OWN_OPTIONS = frozenset({"kv_cache_memory_gib", "omp_threads_bind"})

_CPU_KV_CACHE_GIB = 4
_MAX_LOGPROBS = 20
_STOP_S = 10.0
"""Seconds an EngineCore has to free its device before it is killed."""
_CONTEXT_TOKENS = 6
"""Prompt tokens the detokeniser sees first: some tokenizers join words only in context."""


class VLLMBackend(Backend):
    """Generation through vLLM, one engine per model.

    A resumed call goes on after `prompt + resumed`. Greedy decoding, frequency and repetition penalties,
    min_tokens, max_tokens and grammar mean then what they mean without the break. Two things cannot be carried
    over: a seed starts a new random stream (derived from the seed and the break's position, hence still
    reproducible), and presence_penalty is charged twice to a token that both parts generated.
    """

    capabilities = Capabilities(
        tasks=frozenset({"generate"}),
        parameters=frozenset(f.name for f in fields(SamplingParams)) - {"max_tokens"},
        max_logprobs=_MAX_LOGPROBS,
    )

    def __init__(self, spec: BackendSpec) -> None:
        super().__init__(spec)
        unknown = sorted(set(spec.options) - _ENGINE_OPTIONS - _OWN_OPTIONS)
        if unknown:
            known = ", ".join(sorted(_ENGINE_OPTIONS | _OWN_OPTIONS))
            raise CatalogError(f"backends.{spec.name}.options: vllm has no option {unknown[0]!r}; known: {known}")
        self._engines: dict[str, _Engine] = {}

    async def start(self) -> None:
        """Load each model. Must run on the thread that lives as long as the backend (see vllm_orphans)."""
        vllm_orphans.arm()
        _set_environment()
        for model in self.spec.models:
            self._engines[model.name] = await _start_engine(self.spec, model)
        vllm_grammars.leave_checking_to_the_gateway()

    async def stop(self) -> None:
        engines = list(self._engines.values())
        self._engines.clear()
        for engine in engines:
            engine.expect_the_end()
        await asyncio.gather(*(asyncio.to_thread(engine.shutdown) for engine in engines))

    def check_health(self) -> None:
        for name, engine in self._engines.items():
            if engine.llm.errored:
                raise BackendDead(f"the vllm engine of {name} is dead")

    def num_steps(self) -> int:
        return sum(engine.steps.count for engine in self._engines.values())

    async def generate(self, call: GenerateCall) -> AsyncIterator[Chunk]:
        engine = self._engines.get(call.model)
        if engine is None:
            raise InvalidCall(f"{self.spec.name} does not hold the model {call.model!r}")
        context = [*call.prompt_token_ids[-_CONTEXT_TOKENS:], *call.resumed_token_ids]
        text = Detokenizer(engine.tokenizer, context)
        reason = engine.reason_already_finished(call)
        if reason is not None:
            yield Chunk((), text.finish(), reason)
            return
        outputs: AsyncGenerator[RequestOutput] | None = None
        is_finished = False
        try:
            outputs = engine.llm.generate(_prompt(call), _engine_params(call), call.request_id)
            async for output in outputs:
                is_finished = output.finished
                yield _chunk(output, text, call.params.logprobs)
        except Exception as error:
            raise _translated(error) from error
        finally:
            if outputs is not None and not is_finished:
                await outputs.aclose()
                # A task cancelled inside vLLM's own submission leaves no one else to abort it.
                await engine.llm.abort(call.request_id)


class _Steps:
    """Counts an engine's steps by the outputs that it sends after each: calls that do not stream get theirs
    at the end only."""

    def __init__(self, llm: "AsyncLLM") -> None:
        self.count = 0
        process = llm.output_processor.process_outputs

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return process(*args, **kwargs)

        llm.output_processor.process_outputs = counted


@dataclass(frozen=True, slots=True)
class _Engine:
    llm: "AsyncLLM"
    steps: _Steps
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    context_length: int
    processes: tuple[BaseProcess, ...]

    def reason_already_finished(self, call: GenerateCall) -> FinishReason | None:
        """Why the tokens of an earlier attempt are all there is, or None."""
        resumed, params = call.resumed_token_ids, call.params
        if not resumed:
            return None
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_token_ids)
        if resumed[-1] in ends and len(resumed) >= params.min_tokens:
            return "stop"
        is_full = len(call.prompt_token_ids) + len(resumed) >= self.context_length
        return "length" if is_full or len(resumed) >= params.max_tokens else None

    def expect_the_end(self) -> None:
        """On the loop, before `shutdown`: else vLLM reports the exit of its EngineCore as a failure."""
        self.llm.engine_core.resources.engine_dead = True
        if self.llm.output_handler is not None:
            self.llm.output_handler.cancel()

    def shutdown(self) -> None:
        """Blocks until every process is gone, _STOP_S at most."""
        for process in self.processes:
            if process.is_alive():
                os.kill(cast("int", process.pid), vllm_orphans.STOP_SIGNAL)
        for process in self.processes:
            process.join(_STOP_S)
        self.llm.shutdown(timeout=0)


async def _start_engine(spec: BackendSpec, model: ModelSpec) -> _Engine:
    from vllm.v1.engine.async_llm import AsyncLLM

    before = set(multiprocessing.active_children())
    config = _engine_config(spec, model)
    llm = AsyncLLM.from_vllm_config(config, disable_log_stats=spec.options.get("disable_log_stats", True))
    try:
        # vLLM asks its engine once and remembers; asked here, no call pays for it.
        await llm.get_supported_tasks()
        tokenizer = Tokenizer.from_file(str(Path(model.path) / "tokenizer.json"))
        eos_token_ids = _eos_token_ids(llm)
    except BaseException:
        llm.shutdown(timeout=0)
        raise
    processes = tuple(set(multiprocessing.active_children()) - before)
    return _Engine(llm, _Steps(llm), tokenizer, eos_token_ids, model.context_length, processes)


def _engine_config(spec: BackendSpec, model: ModelSpec) -> "VllmConfig":
    """Starts nothing. Raises CatalogError with vLLM's own words for an option or a model it does not take."""
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    options: dict[str, Any] = {name: value for name, value in spec.options.items() if name in _ENGINE_OPTIONS}
    kv_cache_gib = spec.options.get("kv_cache_memory_gib")
    if current_platform.is_cpu():
        _share_the_processors(spec.options.get("omp_threads_bind", "nobind"))
        options.setdefault("enforce_eager", True)
        if kv_cache_gib is None and "gpu_memory_utilization" not in options:
            kv_cache_gib = _CPU_KV_CACHE_GIB
    try:
        if kv_cache_gib is not None:
            options["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
        return AsyncEngineArgs(
            model=model.path,
            served_model_name=model.name,
            max_model_len=model.context_length,
            max_logprobs=_MAX_LOGPROBS,
            structured_outputs_config={"backend": vllm_grammars.LIBRARY},
            **options,
        ).create_engine_config(UsageContext.ENGINE_CONTEXT)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CatalogError(f"backends.{spec.name}.options, model {model.name}: {reason}") from error


def _set_environment() -> None:
    """What vLLM reads from the environment while it is imported."""
    for name, value in {
        # Forking a process that has threads is not safe, and a forked child would skip the plugin.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }.items():
        os.environ.setdefault(name, value)


def _share_the_processors(omp_threads_bind: str) -> None:
    """CPU only: threads that wait sleep, because other processes need the cores they would spin on.

    docs/decisions/0004-vllm-in-process.md has the measurements.
    """
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", omp_threads_bind)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _eos_token_ids(llm: "AsyncLLM") -> frozenset[int]:
    """The ids at which vLLM ends a sequence by itself: the tokenizer's and the generation config's."""
    configured = llm.model_config.try_get_generation_config().get("eos_token_id")
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    return frozenset(ids | ({llm.renderer.get_eos_token_id()} - {None}))


def _prompt(call: GenerateCall) -> "TokensInput":
    from vllm.inputs import tokens_input

    return tokens_input([*call.prompt_token_ids, *call.resumed_token_ids])


def _engine_params(call: GenerateCall) -> "EngineParams":
    from vllm import SamplingParams as EngineParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    params, resumed = call.params, len(call.resumed_token_ids)
    return EngineParams(
        max_tokens=params.max_tokens - resumed,
        min_tokens=max(0, params.min_tokens - resumed),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=_seed(params.seed, resumed),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=_logit_bias(params, call.resumed_token_ids) or None,
        logprobs=params.logprobs,
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        structured_outputs=None if params.grammar is None else StructuredOutputsParams(grammar=params.grammar),
        extra_args={vllm_grammars.RESUMED: resumed} if params.grammar is not None and resumed else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if call.is_streaming else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def _seed(seed: int | None, resumed: int) -> int | None:
    """vLLM takes -1 for "no seed" and msgpack no more than 64 bits; 63 keep every seed apart.

    A resumed call must not draw again what its first tokens were drawn with.
    """
    return None if seed is None else (seed + resumed) & (2**63 - 1)


def _logit_bias(params: SamplingParams, resumed: tuple[int, ...]) -> dict[int, float]:
    """The call's own bias, and what presence and frequency penalties owe for `resumed`.

    vLLM sees those tokens in the prompt, where it charges nothing for them.
    """
    bias = dict(params.logit_bias)
    if params.presence_penalty or params.frequency_penalty:
        for token, count in Counter(resumed).items():
            bias[token] = bias.get(token, 0.0) - params.presence_penalty - params.frequency_penalty * count
    return bias


def _chunk(output: "RequestOutput", text: Detokenizer, top: int | None) -> Chunk:
    completion = output.outputs[0]
    tokens = tuple(completion.token_ids)
    reason = _finish_reason(completion.finish_reason)
    # With "stop" the last token is an end-of-sequence or stop token: counted, not shown.
    added = text.push(tokens[:-1] if completion.finish_reason == "stop" else tokens)
    if reason is not None:
        added += text.finish()
    if top is None:
        return Chunk(tokens, added, reason)
    positions = zip(tokens, completion.logprobs or (), strict=True)
    return Chunk(tokens, added, reason, tuple(_logprob(token, position, top) for token, position in positions))


def _finish_reason(reason: str | None) -> FinishReason | None:
    match reason:
        case None | "stop" | "length":
            return reason
        case "repetition":
            return "stop"
    # "error", or "abort" while someone still reads: the engine gave the sequence up, the caller did not.
    raise BackendError(f"vllm ended the sequence with {reason!r}")


def _logprob(token: int, position: Mapping[int, Any], top: int) -> TokenLogprob:
    """vLLM reports the sampled token, then the `top` best; the sampled one may be among them."""
    best = sorted((entry.rank, candidate, entry.logprob) for candidate, entry in position.items())
    alternatives = tuple((candidate, logprob) for rank, candidate, logprob in best if rank <= top)
    return TokenLogprob(token, position[token].logprob, alternatives)


def _translated(error: Exception) -> BackendError:
    """vLLM's exception in this package's terms."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, BackendError):
        return error
    if isinstance(error, VLLMClientError):
        return InvalidCall(str(error))
    if isinstance(error, EngineDeadError):
        return BackendDead(str(error))
    return BackendError(f"{type(error).__name__}: {error.__cause__ or error}")
