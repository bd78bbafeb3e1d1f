"""What workers, reconciler and router count. HTTP's own metrics are in `api.metrics`.

Processes of one host share their values through PROMETHEUS_MULTIPROC_DIR, and any gateway's /metrics
shows the sum. Without it a process serves its own on SWITCHYARD_METRICS_PORT.
"""

import functools
from typing import TypeVar

from prometheus_client import Counter, Histogram, start_http_server

import settings

_Metric = TypeVar("_Metric", Counter, Histogram)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

ROUTER_CHOICES = Counter(
    "switchyard_router_choices_total", "Jobs routed, by what was asked for and what was chosen.",
    ["requested_model", "model", "backend"],
)  # fmt: skip
JOBS = Counter("switchyard_jobs_total", "Jobs that reached a final state.", ["backend", "model", "status"])
ATTEMPTS_FAILED = Counter("switchyard_attempts_failed_total", "Attempts that did not succeed.", ["backend", "code"])
FENCED_WRITES = Counter("switchyard_fenced_writes_total", "Results thrown away: the job had moved on.", ["backend"])
DROPPED_MESSAGES = Counter(
    "switchyard_dropped_messages_total", "Messages whose job was not to be had, or that were malformed.", ["reason"]
)
DROPPED_LOG_LINES = Counter("switchyard_dropped_log_lines_total", "Log lines that could not be written.")
QUEUE_SECONDS = Histogram(
    "switchyard_queue_seconds", "From a job's creation to its start.", ["backend"], buckets=_SECONDS
)
RUN_SECONDS = Histogram(
    "switchyard_run_seconds", "From a job's start to its stored result.", ["backend", "model"], buckets=_SECONDS
)
TTFT_SECONDS = Histogram(
    "switchyard_time_to_first_token_seconds", "From a job's creation to its first chunk.", ["backend", "model"],
    buckets=_SECONDS,
)  # fmt: skip
ETA_ERROR_SECONDS = Histogram(
    "switchyard_eta_error_seconds", "How far a job's answer was from its expected (p50) time, either way.", ["backend"],
    buckets=_SECONDS,
)  # fmt: skip
ETA_JOBS = Counter(
    "switchyard_eta_jobs_total", "Jobs by when their answer came: within p50, p90, or late.", ["backend", "within"]
)
TOKENS = Counter("switchyard_tokens_total", "Tokens, by direction.", ["backend", "model", "direction"])
WEBHOOK_TRIES = Counter(
    "switchyard_webhook_tries_total", "Attempts at webhook deliveries, by what came of them.", ["status"]
)
RECONCILER_ACTIONS = Counter("switchyard_reconciler_actions_total", "What the reconciler did.", ["action"])


@functools.cache
def child(metric: _Metric, *labels: str) -> _Metric:
    """`metric.labels(...)`, remembered: the look-up costs four times the increment."""
    return metric.labels(*labels)


def serve() -> None:
    """Serve this process's metrics on SWITCHYARD_METRICS_PORT, where that is set."""
    port = settings.load().metrics_port
    if port:
        start_http_server(port, settings.load().metrics_host)
