"""Native jobs: submit, watch, read, cancel, explain."""

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response

from api import auth, job_answers, schemas
from api.routes import parameters
from db.api_keys import ApiKey
from db.job_views import DeadLetters, Filter
from db.removal import Deletion

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

Caller = Annotated[ApiKey, Depends(auth.authenticate)]
Ended = Literal["succeeded", "failed", "cancelled", "expired"]
Status = Literal["queued", "running"] | Ended


@router.post("", status_code=202, openapi_extra=schemas.openapi_extra("/v1/jobs"))
async def create_job(request: Request, caller: Caller) -> Response:
    """Submit any inference request as a job."""
    return await job_answers.create(request, caller)


_METADATA_FILTER = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "Pairs that the jobs' metadata must have: `metadata[key]=value`.",
    "schema": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 512}},
}


@router.get("", openapi_extra={"parameters": [_METADATA_FILTER]})
async def list_jobs(
    request: Request,
    caller: Caller,
    status: Status | None = None,
    model: Annotated[str | None, parameters.text(256)] = None,
    endpoint: Annotated[str | None, parameters.text(64)] = None,
    after: UUID | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """The caller's jobs, newest first; `after` is the last id of the page before, `metadata[key]=value` names a
    pair that their metadata must have."""
    metadata = job_answers.metadata_of(request)
    wanted = Filter(tenant=caller.tenant, status=status, model=model, endpoint=endpoint, metadata=metadata,
                    after=after, limit=limit)  # fmt: skip
    return await job_answers.page(request, wanted)


@router.delete("")
async def delete_jobs(
    request: Request,
    caller: Caller,
    status: Ended | None = None,
    model: Annotated[str | None, parameters.text(256)] = None,
    endpoint: Annotated[str | None, parameters.text(64)] = None,
    before: Annotated[int | None, Query(ge=0, le=parameters.LAST_SECOND)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> Response:
    """Remove the caller's jobs that have ended, with their answers and the cache entries made of them: all, or those
    that match and ended before a Unix second. The oldest first; `has_more` says that `limit` was reached."""
    wanted = Deletion(tenant=caller.tenant, status=status, model=model, endpoint=endpoint, before=before, limit=limit)
    return await job_answers.delete_all(request, wanted)


@router.get("/{job_id}")
async def get_job(
    request: Request, caller: Caller, job_id: UUID, wait: Annotated[float, Query(ge=0, le=300)] = 0
) -> Response:
    """The job object: 200 once it has ended, 202 before; `wait` holds the answer up to that many seconds."""
    return await job_answers.get(request, caller, job_id, wait)


@router.get("/{job_id}/result")
async def get_job_result(request: Request, caller: Caller, job_id: UUID) -> Response:
    """The answer as the inference route would have given it; 202 while the job has not ended."""
    return await job_answers.result(request, caller, job_id)


@router.get("/{job_id}/stream")
async def stream_job(
    request: Request, caller: Caller, job_id: UUID, starting_after: Annotated[int | None, Query(ge=0)] = None
) -> Response:
    """The job's output as server-sent events, from the start or after event `starting_after` (or Last-Event-ID)."""
    return await job_answers.stream(request, caller, job_id, starting_after)


@router.post("/{job_id}/cancel")
async def cancel_job(request: Request, caller: Caller, job_id: UUID) -> Response:
    """Cancel the job, queued or running. Final."""
    return await job_answers.cancel(request, caller, job_id)


@router.delete("/{job_id}")
async def delete_job(request: Request, caller: Caller, job_id: UUID) -> Response:
    """Remove a job that has ended, its answer, and the cache entry made of it."""
    return await job_answers.delete(request, caller, job_id)


@router.post("/retry", status_code=202)
async def retry_jobs(
    request: Request,
    caller: Caller,
    model: Annotated[str | None, parameters.text(256)] = None,
    code: Annotated[str | None, parameters.text(64)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> Response:
    """Queue the caller's failed jobs again: all, or those of a model or an error code. The oldest first."""
    wanted = DeadLetters(tenant=caller.tenant, model=model, code=code, limit=limit)
    return await job_answers.retry_all(request, wanted)


@router.post("/{job_id}/retry", status_code=202)
async def retry_job(request: Request, caller: Caller, job_id: UUID) -> Response:
    """Queue a failed or expired job again, under its own id and with a full set of attempts."""
    return await job_answers.retry(request, caller, job_id)


@router.get("/{job_id}/events")
async def list_job_events(request: Request, caller: Caller, job_id: UUID) -> Response:
    """What has befallen the job so far, oldest first: accepted, each attempt's start and end, its own end."""
    return await job_answers.events(request, caller, job_id)


@router.get("/{job_id}/explain")
async def explain_job(request: Request, caller: Caller, job_id: UUID) -> Response:
    """The router's decision with every candidate, the cache verdict, and the time each step took."""
    return await job_answers.explain(request, caller, job_id)
