"""The states that a job and a batch go through.

Apart from the tables, so that a process which only asks for states loads no SQLAlchemy.
"""

import enum


class JobStatus(enum.StrEnum):
    """Where a job is. `TRANSITIONS` is the whole state machine."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED})

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset(
        {JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED}
    ),
    # Running goes back to queued when its worker died (rescue), drained or failed an attempt.
    JobStatus.RUNNING: frozenset({JobStatus.QUEUED, *TERMINAL}),
    **{status: frozenset() for status in TERMINAL},
}

RETRYABLE = frozenset({JobStatus.FAILED, JobStatus.EXPIRED})
"""The owner of such a job may have it queued again. Nothing else leaves a final state."""


class BatchStatus(enum.StrEnum):
    """Where a batch is. OpenAI's words."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


BATCH_LIVE = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.CANCELLING)
