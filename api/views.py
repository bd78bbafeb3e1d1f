"""What the ledger holds as JSON: a job for its owner and explained, a delivery of a webhook, usage."""

import datetime
from collections.abc import Mapping
from typing import Any

import settings
from db.job_views import View
from db.states import TERMINAL, JobStatus
from db.usage import Usage
from db.webhooks import Delivery
from tasks.fair_share import Priority

JSON = dict[str, Any]

_NANO = 1_000_000_000


def queue(view: View, ahead: int, expected: Mapping[str, float]) -> JSON:
    """Where a job stands in its queue, 1 being next, and milliseconds until its answer; null: not measured yet."""
    return {
        "name": view.backend,
        "position": ahead + 1,
        "eta_ms": {"p50": expected["eta_p50_ms"], "p90": expected["eta_p90_ms"]} if expected else None,
    }


def queue_as_accepted(view: View) -> JSON | None:
    """As the router saw it when it chose; None for a job that no longer waits."""
    facts = (view.decision.get("chosen") or {}).get("facts", {})
    if view.status != JobStatus.QUEUED or view.leader_id is not None or "num_ahead" not in facts:
        return None
    return queue(view, int(facts["num_ahead"]), facts)


def job(view: View, queue: JSON | None = None) -> JSON:
    """The job object. Times are Unix seconds, `queued_at` that of its last message; durations milliseconds."""
    path = f"/v1/jobs/{view.id}"
    return {
        "id": str(view.id),
        "object": "job",
        "status": view.status,
        "endpoint": view.endpoint,
        "model": view.model,
        "requested_model": view.requested_model,
        "backend": view.backend,
        "stream": view.is_stream,
        "priority": Priority(view.priority).name.lower(),
        "created_at": seconds(view.created_at),
        "queued_at": seconds(view.enqueued_at),
        "started_at": seconds(view.started_at),
        "completed_at": seconds(view.finished_at),
        "deadline_at": seconds(view.deadline_at),
        "expires_at": _expires_at(view),
        "result_ttl_s": view.result_ttl_s,
        "attempt": view.attempt,
        "queue": queue,
        "cache": {"verdict": view.cache_verdict, "key": view.cache_key},
        "leader": None if view.leader_id is None else str(view.leader_id),
        "usage": view.usage,
        "metrics": {
            "queue_ms": _between(view.created_at, view.started_at),
            "ttft_ms": _between(view.created_at, view.first_token_at),
            "run_ms": _between(view.started_at, view.finished_at),
        },
        "error": view.error,
        "urls": {
            "get": path,
            "result": f"{path}/result",
            "stream": f"{path}/stream",
            "cancel": f"{path}/cancel",
            "retry": f"{path}/retry",
            "explain": f"{path}/explain",
            "events": f"{path}/events",
        },
        "webhook": view.webhook,
        "metadata": view.metadata or {},
    }


def _expires_at(view: View) -> int | None:
    """When an ended job and its answer are removed, by the shorter of its own time and the server's."""
    if view.finished_at is None:
        return None
    kept_s = settings.load().result_ttl_s
    return int(view.finished_at.timestamp()) + min(view.result_ttl_s or kept_s, kept_s)


def explanation(view: View) -> JSON:
    """Why the job went where it went, and how long each step took."""
    return {
        "id": str(view.id),
        "object": "job.explanation",
        "status": view.status,
        "request_id": view.request_id,
        "requested_model": view.requested_model,
        "model": view.model,
        "model_revision": view.model_revision,
        "backend": view.backend,
        "worker": view.worker,
        "decision": view.decision,
        "cache": {"verdict": view.cache_verdict, "key": view.cache_key},
        "leader": None if view.leader_id is None else str(view.leader_id),
        "steps": _steps(view),
        "attempt": view.attempt,
        "attempts": view.attempts,
        "prompt_tokens": view.prompt_tokens,
        "usage": view.usage,
        "error": view.error,
    }


def _steps(view: View) -> list[JSON]:
    """In the order of the life of a call. `ms` None: not reached."""
    timings = view.timings
    gateway = [("cache", "cache_ms"), ("tokenise", "tokenise_ms"), ("route", "route_ms")]
    return [
        *({"step": step, "ms": timings.get(name)} for step, name in gateway),
        {"step": "queue", "ms": _between(view.created_at, view.started_at)},
        {"step": "first token", "ms": _between(view.started_at, view.first_token_at)},
        {"step": "run", "ms": timings.get("run_ms")},
        {"step": "store", "ms": _store_ms(view)},
        {"step": "total", "ms": _between(view.created_at, view.finished_at)},
    ]


def _store_ms(view: View) -> float | None:
    """What the last commit took: the ledger's time from start to finish, less the worker's own."""
    run, whole = view.timings.get("run_ms"), _between(view.started_at, view.finished_at)
    return None if run is None or whole is None or view.status not in TERMINAL else round(max(whole - run, 0.0), 3)


def history(view: View) -> JSON:
    """What has befallen the job so far, oldest first: accepted, each attempt's start and end, its own end. `at` is in
    Unix seconds with a fraction; where attempts ended and were retried or taken over, `outcome` says why."""
    events: list[JSON] = [{"type": "job.accepted", "at": _moment(view.created_at)}]
    for one in view.attempts:
        if one.get("started_at") is not None:
            told = {"attempt": one["attempt"], "worker_id": one["worker_id"]}
            events.append({"type": "job.attempt_started", "at": _rounded(one["started_at"]), **told})
            events.append(
                {"type": "job.attempt_ended", "at": _rounded(one["ended_at"]), **told, "outcome": one["outcome"]}
            )
        else:
            # A marker between attempts: asked for again, or inherited from a leader that ended (old ones lack a time).
            events.append({"type": f"job.{one['outcome']}", "at": _rounded(one.get("ended_at")) or events[-1]["at"]})
    ended = [one["started_at"] for one in view.attempts if one.get("started_at") is not None]
    if view.started_at is not None and view.started_at.timestamp() > max(ended, default=0.0) + 1e-6:
        events.append({"type": "job.attempt_started", "at": _moment(view.started_at), "attempt": view.attempt,
                       "worker_id": view.worker_id})  # fmt: skip
        if view.first_token_at is not None:
            events.append({"type": "job.first_token", "at": _moment(view.first_token_at), "attempt": view.attempt})
    if view.status in TERMINAL:
        code = None if view.error is None else view.error.get("code")
        events.append({"type": f"job.{view.status}", "at": _moment(view.finished_at), "code": code})
    events.sort(key=lambda event: event["at"])  # a run taken over began before this job was there
    return {"object": "list", "data": [{"object": "job.event", **event} for event in events], "has_more": False}


def _moment(moment: datetime.datetime | None) -> float | None:
    return None if moment is None else _rounded(moment.timestamp())


def _rounded(at: float | None) -> float | None:
    return None if at is None else round(at, 3)


def seconds(moment: datetime.datetime | None) -> int | None:
    """Unix seconds."""
    return None if moment is None else int(moment.timestamp())


def _between(start: datetime.datetime | None, end: datetime.datetime | None) -> float | None:
    return None if start is None or end is None else round((end - start).total_seconds() * 1000, 3)


def delivery(one: Delivery) -> JSON:
    """The delivery object."""
    return {
        "id": str(one.id),
        "object": "webhook.delivery",
        "event_id": f"evt_{one.id.hex}",
        "type": one.type,
        "data": {"id": one.object_id},
        "url": one.url,
        "status": one.status,
        "attempts": one.attempts,
        "created_at": seconds(one.created_at),
        "next_attempt_at": seconds(one.next_at) if one.status == "pending" else None,
        "ended_at": seconds(one.ended_at),
        "last_status_code": one.last_status,
        "last_error": one.last_error,
    }


def usage(one: Usage) -> JSON:
    """The usage object."""
    return {
        "object": "usage",
        **one.of,
        "num_requests": sum(one.num.values()),
        **{f"num_{name}": number for name, number in one.num.items()},
        "prompt_tokens": one.prompt_tokens,
        "completion_tokens": one.completion_tokens,
        "total_tokens": one.prompt_tokens + one.completion_tokens,
        "cost": one.cost_nano / _NANO,
    }
