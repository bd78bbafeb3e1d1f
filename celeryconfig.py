"""Celery's settings, and only Celery's. Postgres is the truth; what travels here are hints."""

from typing import Any

from kombu import Queue

import catalog
import settings

_settings = settings.load()
_catalog = catalog.load(_settings.config, _settings.models_dir)

broker_url = _settings.redis_url
broker_connection_retry_on_startup = True
broker_transport_options: dict[str, Any] = {
    # The ledger re-sends what is lost, so kombu need not keep a second copy of each message. Its copy
    # costs 3/4 of a consumer's CPU and still loses messages between BRPOP and ZADD.
    "ack_emulation": False,
    # Of a queue, the first emptied first: tasks.fair_share.Level.
    "priority_steps": [0, 1, 2, 3, 4],
    "socket_timeout": 10,
    "socket_connect_timeout": 2,
    "socket_keepalive": True,
    "health_check_interval": 5,
}
broker_connection_max_retries = None

# One queue per backend. Workers name theirs with -Q; Flower shows these from its first second on.
task_queues = [Queue(name) for name in _catalog.backends]
task_default_queue = task_queues[0].name

accept_content = ["json"]
task_serializer = "json"
result_serializer = "json"
task_ignore_result = True
task_acks_late = True
# A worker takes as many messages as it has slots, and no more: a popped message is out of reach.
worker_prefetch_multiplier = 1
worker_cancel_long_running_tasks_on_connection_loss = False
worker_hijack_root_logger = False
worker_send_task_events = True
task_send_sent_event = False
task_remote_tracebacks = False
