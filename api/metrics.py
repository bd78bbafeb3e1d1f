"""HTTP's metrics, and the page that shows everyone's.

Queue depth, oldest age and workers are read from the last survey at scrape time: they are facts of the
ledger, the same whichever gateway is asked.
"""

import os
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import REGISTRY, Collector

from tasks.router import Load

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

REQUEST_SECONDS = Histogram(
    "switchyard_request_seconds", "From a request's first byte to its answer's last.", ["route", "method"],
    buckets=_SECONDS,
)  # fmt: skip
REQUESTS = Counter("switchyard_requests_total", "Requests answered.", ["route", "method", "status_code"])
ERRORS = Counter("switchyard_errors_total", "Requests refused or failed, by error code.", ["route", "code"])
CACHE = Counter("switchyard_cache_total", "Cache verdicts: HIT, MISS or BYPASS, and why.", ["verdict", "reason"])


class _Queues(Collector):  # type: ignore[misc]
    def __init__(self, loads: Mapping[str, Load]) -> None:
        self._loads = loads

    def collect(self) -> Iterable[Metric]:
        depth = GaugeMetricFamily("switchyard_queue_depth", "Jobs queued.", labels=["queue"])
        running = GaugeMetricFamily("switchyard_running_jobs", "Jobs running.", labels=["queue"])
        oldest = GaugeMetricFamily(
            "switchyard_queue_oldest_age_seconds", "Age of the oldest queued job.", labels=["queue"]
        )
        workers = GaugeMetricFamily("switchyard_workers", "Living workers.", labels=["queue", "state"])
        for name, load in self._loads.items():
            depth.add_metric([name], load.depth.num_queued)
            running.add_metric([name], load.depth.num_running)
            oldest.add_metric([name], load.depth.oldest_queued_s)
            for state in ("loading", "ready", "draining"):
                workers.add_metric([name, state], sum(life.state == state for life in load.lives))
        return [depth, running, oldest, workers]


def page(loads: Mapping[str, Load]) -> bytes:
    """Prometheus's text format: all processes of this host where they share a folder, else this one."""
    registry = CollectorRegistry()
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        MultiProcessCollector(registry)
    else:
        registry.register(_Registry())
    registry.register(_Queues(loads))
    text: bytes = generate_latest(registry)
    return text


class _Registry(Collector):  # type: ignore[misc]
    def collect(self) -> Iterable[Metric]:
        found: Iterable[Metric] = REGISTRY.collect()
        return found
