"""The Celery app: `celery -A tasks`. One queue per backend, one task name per kind of work.

A message is `[job id, version]` and its Celery id is the job's id, so Flower shows jobs and never a
prompt. `message` builds the envelope that `send_task` would, without its blocking round trip: 15 µs
against 350 µs (a test compares both envelopes, so an upgrade of Celery cannot part them unnoticed).
"""

import base64
import functools
import itertools
import logging
import uuid
from typing import Any

import orjson
from celery import Celery
from celery.signals import setup_logging
from kombu.transport import TRANSPORT_ALIASES

from tasks.call import VERSION

# By alias and not by `broker_transport`: Flower reads the broker's kind off its URL.
TRANSPORT_ALIASES["redis"] = "tasks.broker:Transport"

app = Celery("switchyard")
app.config_from_object("celeryconfig")

TASKS = {name: f"switchyard.{name}" for name in ("generate", "embed", "classify", "rerank")}


@setup_logging.connect
def _keep_our_logging(**_: Any) -> None:
    """Celery leaves logging alone when someone handles this signal; `tasks.logs` configures it."""
    logging.captureWarnings(True)


def _declare(name: str) -> None:
    @app.task(name=name, acks_late=True, ignore_result=True)
    def run(job_id: str, version: int) -> None:
        # The asyncio pool runs tasks.inference instead of this body.
        raise RuntimeError("start the worker with `-P custom` and CELERY_CUSTOM_WORKER_POOL=tasks.pool:TaskPool")


for _name in TASKS.values():
    _declare(_name)


def message(job_id: uuid.UUID, task: str, queue: str, level: int = 0) -> bytes:
    """The queue's wire form of one message; LPUSH it to `transport.queue_key(queue, level)`."""
    identifier = str(job_id)
    body = base64.b64encode(orjson.dumps([[identifier, VERSION], {}, _EMBED])).decode()
    headers, properties = _template(task)
    return orjson.dumps(
        {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {**headers, "id": identifier, "root_id": identifier},
            "properties": {
                **properties,
                "priority": level,
                "correlation_id": identifier,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "delivery_tag": f"{identifier}.{_PROCESS_ID}.{next(_numbers)}",
            },
        }
    )


_PROCESS_ID = uuid.uuid4().hex[:12]
_numbers = itertools.count()
_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


@functools.cache
def _template(task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    made = app.amqp.as_task_v2("0", TASKS[task], args=("0", VERSION), kwargs={}, argsrepr="", kwargsrepr="",
                                 ignore_result=None)  # fmt: skip
    properties = {**made.properties, "delivery_mode": 2, "body_encoding": "base64"}
    return dict(made.headers), properties
