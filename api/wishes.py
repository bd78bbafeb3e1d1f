"""What a request asks for beside its body: how long to wait, and what the cache may do.

`Prefer: respond-async, wait=n` is RFC 7240; `Cache-Control` is RFC 9111's request side;
`Idempotency-Key` is draft-ietf-httpapi-idempotency-key-header.
"""

import functools
import re
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.datastructures import Headers

from api import errors
from catalog import CacheEntry
from tasks.call import Call
from tasks.fair_share import Priority

_MAX_HEADER = 512
_WAIT = re.compile(r"wait\s*=\s*\"?(\d{1,6})\"?$")
_KEY = re.compile(r"[!-~]{1,255}")
_DURATION = re.compile(r"(\d{1,7})([smh]?)")
_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600}
_ASKING = frozenset({b"prefer", b"cache-control", b"x-cancel-on-disconnect", b"idempotency-key", b"cancel-after"})
_RETRY_COUNT = b"x-stainless-retry-count"


@dataclass(frozen=True, slots=True)
class CacheControl:
    """The directives we honour. `max_age_s` None: any age."""

    is_no_cache: bool = False
    is_no_store: bool = False
    is_only_if_cached: bool = False
    max_age_s: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How one call is to be answered."""

    cache: CacheControl = CacheControl()
    wait_s: float
    """How long the caller waits before a 202 is the answer. 0: not at all."""
    is_async: bool = False
    """The caller asked for respond-async, or posted a job."""
    preference_applied: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    deadline: float | None = None
    """Unix seconds. The earlier of the two counts."""
    priority: Priority = Priority.DEFAULT
    webhook: dict[str, Any] | None = None
    """{"url", "events"?}"""
    result_ttl_s: int | None = None
    cancels_on_disconnect: bool = False
    idempotency_key: str | None = None
    is_retry: bool = False
    """OpenAI's SDK says that it sends this again."""
    has_event_ids: bool = True
    """Some clients take a line of a stream that is not `data:` for an error."""
    is_plain: bool = False
    """No header asked for anything."""
    job_id: uuid.UUID | None = None
    """Of the job to be made, where asking again must lead to the same one."""


def read(headers: Headers, longest_wait_s: float) -> Wish:
    """The wish of an inference request. Preferences that are not ours are ignored, as RFC 7240 says."""
    # One pass over the raw pairs: every look-up by name is a pass of its own.
    is_plain, is_retry = True, False
    for header, value in headers.raw:
        if header in _ASKING:
            is_plain = False
        elif header == _RETRY_COUNT and value != b"0":
            is_retry = True
    if is_plain and not is_retry:
        return _plain(longest_wait_s)
    is_async, wait_s, has_event_ids = False, None, True
    applied = []
    for preference in re.split(r"[,;]", headers.get("prefer", "")[:_MAX_HEADER]):
        name = preference.strip().lower()
        if name == "respond-async":
            is_async = True
            applied.append("respond-async")
        elif name == "no-event-ids":
            has_event_ids = False
            applied.append("no-event-ids")
        elif match := _WAIT.match(name):
            wait_s = min(float(match[1]), longest_wait_s)
            applied.append(f"wait={int(wait_s)}")
    if wait_s is None:
        wait_s = 0.0 if is_async else longest_wait_s
    return Wish(
        cache=cache_control(headers.get("cache-control", "")),
        wait_s=wait_s,
        is_async=is_async,
        preference_applied=", ".join(applied) or None,
        cancels_on_disconnect=headers.get("x-cancel-on-disconnect", "").lower() == "true",
        timeout_s=_cancel_after(headers.get("cancel-after")),
        idempotency_key=_idempotency_key(headers.get("idempotency-key")),
        is_retry=is_retry,
        has_event_ids=has_event_ids,
    )


def _idempotency_key(value: str | None) -> str | None:
    """The draft wants a quoted string; clients in the field send bare ones as well."""
    if value is None:
        return None
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = value[1:-1]
    if not _KEY.fullmatch(value):
        raise errors.InvalidValue("Idempotency-Key must have 1 to 255 printable ASCII characters.")
    return value


def _cancel_after(value: str | None) -> float | None:
    """Replicate's header: `30`, `30s`, `5m` or `1h` until the job expires."""
    if value is None:
        return None
    match = _DURATION.fullmatch(value.strip())
    if match is None or int(match[1]) == 0:
        raise errors.InvalidValue("Cancel-After must be a whole number of seconds, or end in s, m or h.")
    return float(int(match[1]) * _UNITS_S[match[2]])


def in_tier(wish: Wish, call: Call) -> Wish:
    """The wish at the priority of the call's service tier, unless it names one itself."""
    if call.service_tier is None or wish.priority is not Priority.DEFAULT:
        return wish
    return replace(wish, priority=Priority[call.service_tier.upper()])


@functools.cache
def _plain(wait_s: float) -> Wish:
    return Wish(wait_s=wait_s, is_plain=True)


def cache_control(value: str) -> CacheControl:
    """Directives we do not know are ignored; a max-age that is no number is refused."""
    no_cache = no_store = only_if_cached = False
    max_age = None
    for directive in value[:_MAX_HEADER].lower().split(","):
        name, _, argument = directive.strip().partition("=")
        if name == "no-cache":
            no_cache = True
        elif name == "no-store":
            no_store = True
        elif name == "only-if-cached":
            only_if_cached = True
        elif name == "max-age":
            if not argument.strip('"').isdecimal():
                raise errors.InvalidValue("Cache-Control: max-age must be a whole number of seconds.")
            max_age = min(int(argument.strip('"')), 2**31)
    return CacheControl(no_cache, no_store, only_if_cached, max_age)


@dataclass(frozen=True, slots=True)
class CachePlan:
    """What the cache does for one call, and why."""

    is_read: bool
    is_written: bool
    reason: str = ""
    """Why not, where it is not read."""
    is_refresh: bool = False
    """The new answer replaces a stored one."""


def plan_cache(call: Call, control: CacheControl, cache: CacheEntry) -> CachePlan:
    """Sampled answers differ each time, so they are stored only for callers who ask by naming an age."""
    if not cache.enabled:
        return CachePlan(False, False, "disabled")
    if control.is_no_store:
        return CachePlan(False, False, "no-store")
    if call.format.get("response", {}).get("store"):
        return CachePlan(False, False, "a stored response")
    is_asked = bool(control.max_age_s) or control.is_only_if_cached
    if is_sampled(call) and not is_asked:
        return CachePlan(False, False, "sampled")
    if control.is_no_cache or control.max_age_s == 0:
        return CachePlan(False, True, "no-cache", is_refresh=True)
    return CachePlan(True, True)


def is_sampled(call: Call) -> bool:
    """Whether running the call twice may give two answers."""
    return call.task == "generate" and call.params.get("temperature", 1.0) > 0 and call.params.get("seed") is None
