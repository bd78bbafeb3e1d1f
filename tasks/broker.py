"""kombu's Redis transport, made safe against what is not a message, and quick when many wait.

Stock, one malformed entry in a queue ends the worker with an unrecoverable error. Whoever can write to
Redis could restart every worker that way; here such an entry is dropped and counted.
"""

import json
import time
from queue import Empty
from typing import Any

import structlog
from kombu.transport import redis

from tasks import metrics

log = structlog.get_logger()


_MALFORMED = (ValueError, TypeError, KeyError, AttributeError)
_BUSY_S = 0.005
"""Two messages this close together suggest that more are waiting."""
_MOST = 64


def _drop(error: Exception) -> None:
    metrics.DROPPED_MESSAGES.labels("malformed").inc()
    log.error("message.malformed", error=type(error).__name__)


class Channel(redis.Channel):
    _last_read = 0.0

    def _brpop_read(self, **options: Any) -> Any:
        try:
            taken = super()._brpop_read(**options)
        except _MALFORMED as error:
            _drop(error)
            raise Empty from None
        now = time.monotonic()
        is_busy, self._last_read = now - self._last_read < _BUSY_S, now
        if is_busy:
            self._take_more()
        return taken

    def _take_more(self) -> None:
        """Take what else is waiting, as far as there are free slots, in one round trip: stock, each message
        costs a BRPOP and two turns of the hub."""
        for queue in self.active_queues:
            free = self.qos.can_consume_max_estimate()
            if not free:
                return
            keys = [self._q_for_pri(queue, level) for level in self.priority_steps]
            with self.conn_or_acquire() as client:
                # From the first level that has any.
                taken = client.lmpop(len(keys), *keys, direction="RIGHT", count=min(free, _MOST))
            for item in taken[1] if taken else ():
                try:
                    self.connection._deliver(json.loads(item), queue)  # noqa: SLF001 - as _brpop_read does
                except _MALFORMED as error:
                    _drop(error)


class Transport(redis.Transport):
    Channel = Channel
