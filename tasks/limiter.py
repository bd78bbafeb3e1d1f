"""Rates: at most so much in any minute, counted together by every gateway process in Redis, in one round trip.

The window slides in slots of a sixtieth. What was let through counts for as many slots as the window has and
the one that is running, so that no window, wherever it begins, holds more than its limit; what is refused could
be let through at most one slot earlier. A burst up to the limit is let through at once.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import redis.asyncio
import structlog

from tasks import transport

log = structlog.get_logger()

_FAIL_FAST_S = 1.0
_MOST_LOCAL = 10_000

_SCRIPT = """
local now, window, slots = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
if now < 0 then
    local time = redis.call('TIME')
    now = time[1] * 1000 + math.floor(time[2] / 1000)
end
local width = window / slots
local current = math.floor(now / width)
local is_allowed, answer = 1, {0}
for number, key in ipairs(KEYS) do
    local limit, amount = tonumber(ARGV[2 + 2 * number]), tonumber(ARGV[3 + 2 * number])
    local count, kept = 0, {}
    local stored = redis.call('HGETALL', key)
    for at = 1, #stored, 2 do
        local slot, taken = tonumber(stored[at]), tonumber(stored[at + 1])
        if slot < current - slots then
            redis.call('HDEL', key, stored[at])
        else
            count = count + taken
            kept[#kept + 1] = {slot, taken}
        end
    end
    table.sort(kept, function(a, b) return a[1] < b[1] end)
    local wait = 0
    if count + amount > limit then
        is_allowed = 0
        local excess = count + amount - limit
        wait = -1
        for _, one in ipairs(kept) do
            excess = excess - one[2]
            if excess <= 0 then
                wait = math.ceil((one[1] + slots + 1) * width - now)
                break
            end
        end
    end
    local reset = #kept > 0 and math.ceil((kept[#kept][1] + slots + 1) * width - now) or 0
    answer[#answer + 1] = {count, wait, reset}
end
if is_allowed == 1 then
    for number, key in ipairs(KEYS) do
        local amount = tonumber(ARGV[3 + 2 * number])
        if amount > 0 then
            redis.call('HINCRBY', key, string.format('%.0f', current), amount)
            redis.call('PEXPIRE', key, window + 2 * math.ceil(width))
            answer[1 + number] = {answer[1 + number][1] + amount, 0, math.ceil((current + slots + 1) * width - now)}
        end
    end
end
answer[1] = is_allowed
return answer
"""


@dataclass(frozen=True, slots=True)
class Ask:
    """How much of one window is asked for. 0 only looks."""

    name: str
    limit: int
    amount: int


@dataclass(frozen=True, slots=True)
class Figure:
    """How one window stands afterwards."""

    limit: int
    remaining: int
    wait_s: float | None
    """Until what was refused would be let through. None: never, it is more than the limit."""
    reset_s: float
    """Until the whole limit is free again, if nothing more comes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """All that was asked was taken, or nothing."""

    is_allowed: bool
    figures: tuple[Figure, ...]
    is_degraded: bool = False


class Window:
    """One window in this process's memory; by the arithmetic of the script."""

    def __init__(self, window_ms: int, slots: int) -> None:
        self._width = window_ms / slots
        self._slots = slots
        self._taken: dict[int, int] = {}

    def look(self, now_ms: float, limit: int, amount: int) -> tuple[bool, Figure]:
        """Whether `amount` fits, and how the window stands."""
        current = int(now_ms // self._width)
        for slot in [slot for slot in self._taken if slot < current - self._slots]:
            del self._taken[slot]
        count = sum(self._taken.values())
        wait_s: float | None = 0.0
        if count + amount > limit:
            wait_s, excess = None, count + amount - limit
            for slot in sorted(self._taken):
                excess -= self._taken[slot]
                if excess <= 0:
                    wait_s = self._until_gone(slot, now_ms)
                    break
        reset_s = self._until_gone(max(self._taken), now_ms) if self._taken else 0.0
        return count + amount <= limit, Figure(limit, max(limit - count, 0), wait_s, reset_s)

    def add(self, now_ms: float, amount: int) -> None:
        current = int(now_ms // self._width)
        self._taken[current] = self._taken.get(current, 0) + amount

    def _until_gone(self, slot: int, now_ms: float) -> float:
        return ((slot + self._slots + 1) * self._width - now_ms) / 1000


class Limiter:
    """Takes from windows in Redis. While Redis is away each process keeps to its share of every limit."""

    def __init__(
        self, client: redis.asyncio.Redis, *, num_processes: int = 1, window_s: float = 60.0, slots: int = 60,
        patience_s: float = 0.5,
    ) -> None:  # fmt: skip
        self.num_processes = num_processes
        """How many share the limits."""
        self._script = client.register_script(_SCRIPT)
        self._window_ms, self._slots = int(window_s * 1000), slots
        self._patience_s = patience_s
        self._local: dict[str, Window] = {}
        """What this process alone let through: its share starts where it stands when Redis goes away."""
        self._failed_at = float("-inf")

    async def take(self, asks: Sequence[Ask], now_ms: int = -1) -> Verdict:
        """Take all of it or nothing. `now_ms`: instead of Redis's own clock."""
        if time.monotonic() - self._failed_at > _FAIL_FAST_S:
            try:
                async with asyncio.timeout(self._patience_s):
                    return await self._ask_redis(asks, now_ms)
            except (TimeoutError, *transport.DOWN) as error:
                self._failed_at = time.monotonic()
                log.warning("limiter.degraded", error=type(error).__name__, processes=self.num_processes)
        return self._ask_memory(asks)

    async def _ask_redis(self, asks: Sequence[Ask], now_ms: int) -> Verdict:
        arguments = [part for ask in asks for part in (ask.limit, ask.amount)]
        keys = [transport.RATE.format(ask.name) for ask in asks]
        is_allowed, *figures = await self._script(keys=keys, args=[now_ms, self._window_ms, self._slots, *arguments])
        if is_allowed:
            self._remember(asks)
        made = tuple(
            Figure(ask.limit, max(ask.limit - count, 0), None if wait < 0 else wait / 1000, reset / 1000)
            for ask, (count, wait, reset) in zip(asks, figures, strict=True)
        )
        return Verdict(bool(is_allowed), made)

    def _ask_memory(self, asks: Sequence[Ask]) -> Verdict:
        now_ms = time.monotonic() * 1000
        seen = [self._window(ask.name).look(now_ms, self._share(ask.limit), ask.amount) for ask in asks]
        is_allowed = all(fits for fits, _ in seen)
        if is_allowed:
            self._remember(asks)
            seen = [self._window(ask.name).look(now_ms, self._share(ask.limit), 0) for ask in asks]
        return Verdict(is_allowed, tuple(figure for _, figure in seen), is_degraded=True)

    def _share(self, limit: int) -> int:
        """At least one, so that a limit smaller than the number of processes does not close the door."""
        return max(limit // max(self.num_processes, 1), min(limit, 1))

    def _remember(self, asks: Sequence[Ask]) -> None:
        now_ms = time.monotonic() * 1000
        for ask in asks:
            if ask.amount:
                self._window(ask.name).add(now_ms, ask.amount)

    def _window(self, name: str) -> Window:
        window = self._local.get(name)
        if window is None:
            if len(self._local) >= _MOST_LOCAL:
                self._local.clear()
            window = self._local[name] = Window(self._window_ms, self._slots)
        return window
