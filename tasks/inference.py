"""The worker's half of the life of a call: claim → run → finish. `enqueue` is the gateway's last step.

A message may come twice, late, or never: the ledger decides who runs a job, and this code only asks.
"""

import asyncio
import contextlib
import hashlib
import time
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
import structlog
from tokenizers import Tokenizer

from backends.base import BackendDead, BackendError, EncodeCall, GenerateCall, InvalidCall, SamplingParams
from catalog import ModelSpec
from db import jobs
from db.jobs import Claimed, Suspect
from db.lanes import Answer, Lane, LaneDown
from db.states import JobStatus
from tasks import celery, metrics, replay, responses, responses_encoders, stream, transport
from tasks.call import VERSION, Call
from tasks.fair_share import Level
from tasks.identity import Identity, usage_of
from tasks.output import Output

if TYPE_CHECKING:
    import numpy as np

    from tasks.worker import Worker

log = structlog.get_logger()

_Result = TypeVar("_Result")


def enqueue(
    outbox: transport.Outbox,
    sent: Sequence[tuple[uuid.UUID, str, str]],
    level: Level = Level.WITHIN_SHARE,
    *,
    is_first: bool = False,
) -> None:
    """Send the messages of (job id, backend, task), rows already committed, to a level of their queue; `is_first`
    goes before what waits there. May be repeated."""
    for job_id, backend, task in sent:
        message = celery.message(job_id, task, backend, level.step)
        outbox.send("RPUSH" if is_first else "LPUSH", transport.queue_key(backend, level.step), message)


@dataclass(slots=True)
class Run:
    """One attempt in progress."""

    job: Claimed
    call: Call
    model: ModelSpec
    started: float
    """time.monotonic() at the claim."""
    writer: stream.Writer | None = None
    task: "asyncio.Task[None] | None" = None
    is_finishing: bool = False
    is_stalled: bool = False
    """Stopped because the backend hung, perhaps of this very job: its attempt counts."""
    first_chunk_s: float | None = None
    outputs: list[Output] = field(default_factory=list)

    @property
    def identity(self) -> Identity:
        return Identity(self.call.endpoint, self.job.id, self.model.name, self.job.created)


async def run(worker: "Worker", job_id: uuid.UUID, version: int) -> None:
    """Everything one message causes. Raises nothing: each way it can end is recorded in the ledger."""
    if version != VERSION:
        # Kept for whoever looks, not dropped: the job waits in the ledger for a worker that knows its form.
        metrics.child(metrics.DROPPED_MESSAGES, "unknown_version").inc()
        worker.outbox.send("LPUSH", transport.PARKED_KEY, orjson.dumps([str(job_id), version]))
        worker.outbox.send("LTRIM", transport.PARKED_KEY, 0, transport.MOST_PARKED - 1)
        log.error("message.parked", job_id=str(job_id), version=version, known=VERSION)
        return
    async with worker.gate.together():
        claimed = await _claim(worker, worker.claims, job_id)
        if isinstance(claimed, Claimed):
            await _run(worker, claimed)
    if claimed is Suspect.SUSPECT:
        async with worker.gate.alone():
            alone = await _claim(worker, worker.claims_alone, job_id)
            if isinstance(alone, Claimed):
                await _run(worker, alone)


async def _claim(worker: "Worker", claims: "Lane[tuple[uuid.UUID, int], Answer]", job_id: uuid.UUID) -> "Answer | None":
    # Beside a run of its own that the ledger has given up, a second one would compute the same again, and what
    # was said of the first (a stop, the gate) would be taken for it. In both cases the job stays queued, and its
    # message is sent again.
    if worker.is_leaving or worker.is_running(job_id):
        return None
    try:
        claimed = await claims.submit((job_id, worker.id))
    except LaneDown:
        log.error("job.claim_failed", job_id=str(job_id))
        return None
    if claimed is None:
        metrics.child(metrics.DROPPED_MESSAGES, "not_queued").inc()
    return claimed


async def _run(worker: "Worker", claimed: Claimed) -> None:
    job_id = claimed.id
    log.info("job.claimed", job_id=str(job_id), attempt=claimed.attempt, queue_ms=round(claimed.queue_ms, 1))
    metrics.child(metrics.QUEUE_SECONDS, claimed.backend).observe(claimed.queue_ms / 1000)
    if claimed.attempt == 1 and time.monotonic() - claimed.queue_ms / 1000 > worker.full_at:
        worker.service.observe_dispatch(claimed.queue_ms)
    started = time.monotonic()
    try:
        call = Call.decode(claimed.payload)
        attempt = Run(claimed, call, worker.models[call.model], started, task=asyncio.current_task())
    except (ValueError, KeyError) as error:
        await _end(worker, claimed, "internal_error", f"this worker cannot read the job ({type(error).__name__})")
        return
    with worker.running(attempt):
        try:
            await _attempt(worker, attempt)
        except LaneDown:
            # Postgres stayed away longer than a finished result waits: the lease has run out long ago.
            log.error("job.outcome_lost", job_id=str(job_id), attempt=claimed.attempt)


async def _attempt(worker: "Worker", attempt: Run) -> None:
    job = attempt.job
    try:
        if job.is_stream:
            attempt.writer = await _writer(worker, attempt)
        body = await _compute(worker, attempt)
    except InvalidCall as error:
        await _fail(worker, attempt, "invalid_request", str(error), is_retryable=False)
    except BackendDead as error:
        await _fail(worker, attempt, "backend_dead", str(error))
        worker.die("the backend died")
    except BackendError as error:
        await _fail(worker, attempt, "backend_error", str(error))
    except asyncio.CancelledError:
        await worker.stopped(attempt)
    except Exception as error:
        # A process border: a bug in one job's path must not take the other jobs of this worker along.
        log.exception("job.crashed", job_id=str(job.id))
        await _fail(worker, attempt, "internal_error", type(error).__name__)
    else:
        await _finish(worker, attempt, body)


async def _fail(worker: "Worker", attempt: Run, code: str, message: str, *, is_retryable: bool = True) -> None:
    attempt.is_finishing = True
    await _end(worker, attempt.job, code, message, is_retryable=is_retryable, writer=attempt.writer)


async def _compute(worker: "Worker", attempt: Run) -> bytes:
    call, identity = attempt.call, attempt.identity
    if call.task == "generate":
        await _generate(worker, attempt)
        return responses.generated(identity, call, attempt.outputs)
    wanted = EncodeCall(
        request_id=f"{attempt.job.id}-{attempt.job.run}",
        model=attempt.model.name,
        inputs=call.token_ids,
        type_ids=call.type_ids,
        dimensions=call.format.get("dimensions"),
        options=call.options,
    )
    if call.task == "embed":
        return responses_encoders.embedded(identity, call, await worker.backend.embed(wanted))
    if call.task == "rerank":
        return responses_encoders.scored(identity, call, await _scores(worker, wanted, call.num_queries))
    labels = attempt.model.labels or [f"LABEL_{index}" for index in range(2)]
    return responses_encoders.classified(identity, call, await worker.backend.classify(wanted), labels)


async def _scores(worker: "Worker", wanted: EncodeCall, num_queries: int) -> "Sequence[float] | np.ndarray":
    """A score per document. A bi-encoder takes one query at a time; the backend batches what comes together."""
    if num_queries == 1 or wanted.type_ids is not None:
        return await worker.backend.rerank(wanted)
    pairs = zip(wanted.inputs[:num_queries], wanted.inputs[num_queries:], strict=True)
    scores = await _together([
        worker.backend.rerank(replace(wanted, request_id=f"{wanted.request_id}-{at}", inputs=[query, document]))
        for at, (query, document) in enumerate(pairs)
    ])  # fmt: skip
    return [float(score[0]) for score in scores]


async def _generate(worker: "Worker", attempt: Run) -> None:
    call = attempt.call
    if not attempt.outputs:
        attempt.outputs = [_output(attempt) for _ in range(len(call.token_ids) * call.n)]
    if len(attempt.outputs) == 1:
        await _sequence(worker, attempt, 0)
        return
    await _together([_sequence(worker, attempt, choice) for choice in range(len(attempt.outputs))])


async def _together(works: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """Run them at once; the first failure stops the others."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failed:
        raise min(failed.exceptions, key=_gravity) from None
    return [one.result() for one in running]


def _gravity(error: BaseException) -> int:
    """Orders what choices failed of: a dead backend outweighs a refused call, and that a failed attempt."""
    order = (BackendDead, InvalidCall, BackendError)
    return next((rank for rank, kind in enumerate(order) if isinstance(error, kind)), len(order))


async def _sequence(worker: "Worker", attempt: Run, choice: int) -> None:
    output = attempt.outputs[choice]
    if output.finish_reason is not None:  # an earlier attempt completed this choice
        return
    chunks = worker.backend.generate(_generate_call(attempt, choice, tuple(output.token_ids)))
    async with contextlib.aclosing(chunks) as closing:  # type: ignore[type-var]
        async for chunk in closing:
            if attempt.first_chunk_s is None:
                attempt.first_chunk_s = time.monotonic() - attempt.started
            piece = output.push(chunk)
            if attempt.writer is not None:
                attempt.writer.write(choice, piece)
            if piece.finish_reason is not None:
                return
    raise BackendError("the backend ended a sequence without a reason")


def _generate_call(attempt: Run, choice: int, resumed: tuple[int, ...]) -> GenerateCall:
    call = attempt.call
    params = dict(call.params)
    if params.get("seed") is not None:
        params["seed"] += choice % call.n  # choices of one prompt must differ, reproducibly
    if "logit_bias" in params:
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    if "stop_token_ids" in params:
        params["stop_token_ids"] = tuple(params["stop_token_ids"])
    assert call.max_tokens is not None
    return GenerateCall(
        request_id=f"{attempt.job.id}-{attempt.job.run}-{choice}",
        model=attempt.model.name,
        prompt_token_ids=call.token_ids[choice // call.n],
        params=SamplingParams(max_tokens=call.max_tokens, **params),
        is_streaming=attempt.writer is not None or bool(call.stop),
        resumed_token_ids=resumed,
        options=call.options,
    )


def _output(attempt: Run) -> Output:
    wants_logprobs = attempt.call.params.get("logprobs") is not None
    tokenizer = _tokenizer(attempt.model.path) if wants_logprobs else None
    return Output(attempt.call.stop, attempt.model.entry.mask, tokenizer)


_tokenizers: dict[str, Tokenizer] = {}


def _tokenizer(path: str) -> Tokenizer:
    if path not in _tokenizers:
        _tokenizers[path] = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    return _tokenizers[path]


async def _writer(worker: "Worker", attempt: Run) -> stream.Writer:
    """The job's event writer. A later attempt goes on where the events of the earlier ones end: their
    tokens are not generated again, and the caller's stream has no gap and no repeat. Where Redis lost
    those events, the attempt starts anew under numbers that say so."""
    job, call = attempt.job, attempt.call
    if not job.was_begun:
        return stream.Writer(job.flight_id, worker.broadcaster)
    try:
        past = stream.latest_run(await stream.take_over(worker.redis, job.flight_id, job.token))
    except transport.DOWN:
        past = []
    attempt.outputs = [_output(attempt) for _ in range(len(call.token_ids) * call.n)]
    for event in past:
        if event.piece is not None:
            attempt.outputs[event.choice].resume(event.piece)
    return stream.Writer(job.flight_id, worker.broadcaster, past, run=job.run, token=job.token)


async def _finish(worker: "Worker", attempt: Run, body: bytes) -> None:
    job, call = attempt.job, attempt.call
    attempt.is_finishing = True
    usage = usage_of(call, attempt.outputs)
    run_s = time.monotonic() - attempt.started
    ttft_s = attempt.first_chunk_s if attempt.first_chunk_s is not None else run_s
    writer = attempt.writer
    num_followers = await worker.finishes.submit(
        jobs.Finished(
            id=job.id,
            run=job.run,
            worker_id=worker.id,
            body=body,
            sha256=hashlib.sha256(body).digest(),
            usage=orjson.dumps(usage).decode(),
            ttft_ms=ttft_s * 1000,
            timings=orjson.dumps({"run_ms": round(run_s * 1000, 3)}).decode(),
            events=None if writer is None else replay.encode(writer.first, writer.marks),
        )
    )
    if num_followers is None:
        metrics.child(metrics.FENCED_WRITES, job.backend).inc()
        log.warning("job.fenced", job_id=str(job.id), attempt=job.attempt)
        return
    if num_followers:
        await worker.land(job.id)
    worker.announce(job.id, JobStatus.SUCCEEDED, writer)
    stored_s = time.monotonic() - attempt.started
    worker.service.observe(attempt.model.name, run_s, stored_s, ttft_s, usage.get("completion_tokens", 0))
    metrics.child(metrics.JOBS, job.backend, attempt.model.name, JobStatus.SUCCEEDED).inc()
    metrics.child(metrics.RUN_SECONDS, job.backend, attempt.model.name).observe(run_s)
    metrics.child(metrics.TTFT_SECONDS, job.backend, attempt.model.name).observe(job.queue_ms / 1000 + ttft_s)
    _check_eta(job, stored_s)
    metrics.child(metrics.TOKENS, job.backend, attempt.model.name, "prompt").inc(usage["prompt_tokens"])
    metrics.child(metrics.TOKENS, job.backend, attempt.model.name, "completion").inc(usage.get("completion_tokens", 0))
    log.info("job.finished", job_id=str(job.id), attempt=job.attempt, run_ms=round(run_s * 1000, 1),
             ttft_ms=round(ttft_s * 1000, 1), completion_tokens=usage.get("completion_tokens"))  # fmt: skip


def _check_eta(job: Claimed, stored_s: float) -> None:
    """Compare what was expected of the job with what came: the estimate's own error is for all to see."""
    if job.eta_p50_ms is None or job.eta_p90_ms is None:
        return
    took_ms = job.queue_ms + stored_s * 1000
    within = "p50" if took_ms <= job.eta_p50_ms else "p90" if took_ms <= job.eta_p90_ms else "late"
    metrics.child(metrics.ETA_ERROR_SECONDS, job.backend).observe(abs(took_ms - job.eta_p50_ms) / 1000)
    metrics.child(metrics.ETA_JOBS, job.backend, within).inc()


async def _end(worker: "Worker", job: Claimed, code: str, message: str, *, is_retryable: bool = False,
               writer: stream.Writer | None = None) -> None:  # fmt: skip
    """Record an attempt that failed; queue the job again where another attempt may help."""
    state = await worker.end(job, code, message, is_retryable=is_retryable)
    metrics.child(metrics.ATTEMPTS_FAILED, job.backend, code).inc()
    log.warning("job.attempt_failed", job_id=str(job.id), attempt=job.attempt, code=code, state=state)
    if state is JobStatus.QUEUED:
        enqueue(worker.outbox, [(job.id, job.backend, job.task)])
    elif state is not None:
        worker.announce(job.id, state, writer)
