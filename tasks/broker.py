"""kombu's Redis transport, made safe against what is not a message.

Stock, one malformed entry in a queue ends the worker with an unrecoverable error. Whoever can write to
Redis could restart every worker that way; here such an entry is dropped and counted.
"""

from queue import Empty
from typing import Any

import structlog
from kombu.transport import redis

from tasks import metrics

log = structlog.get_logger()


class Channel(redis.Channel):  # type: ignore[misc]
    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            metrics.DROPPED_MESSAGES.labels("malformed").inc()
            log.error("message.malformed", error=type(error).__name__)
            raise Empty from None


class Transport(redis.Transport):  # type: ignore[misc]
    Channel = Channel
