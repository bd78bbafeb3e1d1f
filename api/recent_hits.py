"""Hits that Postgres confirmed within the last second, by the raw request.

A hot entry costs Postgres one look-up a second and process, and its requests neither decoding nor
parsing. A purge takes effect at once in the process that answers it, and within a second in the others.
"""

import dataclasses
import time
from collections.abc import MutableMapping
from dataclasses import dataclass

from db.cache import Hit
from tasks.call import Call

_TRUSTED_S = 1.0
_MOST_ENTRIES = 2048
_MOST_BYTES = 65_536
"""Of request and answer together; larger ones are looked up each time."""

RequestKey = tuple[str, str, bytes]
"""Tenant, endpoint, body."""


@dataclass(frozen=True, slots=True)
class RecentHit:
    """A confirmed hit and the call it answered."""

    call: Call
    hit: Hit
    confirmed: float
    """time.monotonic()"""

    def now(self) -> Hit:
        """The hit, as old as it is by now."""
        passed = int(time.monotonic() - self.confirmed)
        return dataclasses.replace(self.hit, age_s=self.hit.age_s + passed) if passed else self.hit


class RecentHits:
    """At most 2,048 of them."""

    def __init__(self, counts: MutableMapping[bytes, int]) -> None:
        self._known: dict[RequestKey, RecentHit] = {}
        self._counts = counts

    def get(self, key: RequestKey) -> RecentHit | None:
        """The hit for this very request, counted as one."""
        known = self._known.get(key)
        if known is None:
            return None
        if time.monotonic() - known.confirmed > _TRUSTED_S:
            del self._known[key]
            return None
        self._counts[known.hit.key] = self._counts.get(known.hit.key, 0) + 1
        return known

    def put(self, key: RequestKey, call: Call, hit: Hit) -> None:
        """Remember a hit that Postgres has just confirmed."""
        if len(key[2]) + len(hit.body) > _MOST_BYTES:
            return
        if len(self._known) >= _MOST_ENTRIES:
            self._known.clear()
        self._known[key] = RecentHit(call, hit, time.monotonic())

    def clear(self) -> None:
        self._known.clear()
