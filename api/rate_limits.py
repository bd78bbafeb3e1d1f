"""Rates of keys and tenants: taken once per call, and told in the headers of every answer to a limited key."""

import math
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from api import errors
from db.api_keys import ApiKey
from db.tenants import Limits
from tasks.limiter import Ask, Figure, Limiter, Verdict

Unit = Literal["requests", "tokens"]
Headers = list[tuple[bytes, bytes]]

_verdict: ContextVar["_Seen | None"] = ContextVar("_verdict", default=None)
"""What this request was told by the limiter."""


@dataclass(frozen=True, slots=True)
class _Seen:
    key_id: uuid.UUID
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class _Rule:
    """One limit of a caller."""

    of: Literal["key", "tenant"]
    unit: Unit
    subject: str
    limit: int

    def ask(self, tokens: int) -> Ask:
        return Ask(f"{self.subject}:{self.unit}", self.limit, 1 if self.unit == "requests" else tokens)


class RateLimits:
    """The rules of callers before one limiter."""

    def __init__(self, limiter: Limiter) -> None:
        self.limiter = limiter
        self.is_used = False
        """Whether anybody has a limit."""

    async def take(self, caller: ApiKey, tokens: int) -> None:
        """Count one request of at most so many tokens. Raises RateLimited."""
        if not caller.has_rate_limit:
            return
        self.is_used = True
        rules = _rules(caller)
        verdict = await self.limiter.take([rule.ask(tokens) for rule in rules])
        _verdict.set(_Seen(caller.id, verdict))
        if not verdict.is_allowed:
            raise _refusal(rules, verdict)

    async def headers(self, caller: ApiKey) -> Headers:
        """For the answer to a limited caller's request; one that took nothing looks."""
        if not caller.has_rate_limit:
            return [(b"ratelimit-policy", _policy(caller).encode())]
        rules = _rules(caller)
        seen = _verdict.get()
        if seen is not None and seen.key_id == caller.id:
            verdict = seen.verdict
        else:
            verdict = await self.limiter.take([Ask(rule.ask(0).name, rule.limit, 0) for rule in rules])
        made: Headers = [
            (b"ratelimit-policy", _policy(caller).encode()),
            (b"ratelimit", _standing(rules, verdict).encode()),
        ]
        for unit in ("requests", "tokens"):
            figures = [figure for rule, figure in zip(rules, verdict.figures, strict=True) if rule.unit == unit]
            if figures:
                made += _openai(unit, min(figures, key=lambda figure: figure.remaining))
        if verdict.is_degraded:
            made.append((b"x-ratelimit-policy", b"degraded"))
        return made


def is_limited(caller: ApiKey) -> bool:
    """Whether answers to this caller tell of limits."""
    return caller.has_rate_limit or caller.has_budget


def _rules(caller: ApiKey) -> list[_Rule]:
    subjects: list[tuple[Literal["key", "tenant"], str, Limits]] = [
        ("key", f"key:{caller.id}", caller.limits),
        ("tenant", f"tenant:{caller.tenant}", caller.tenant_limits),
    ]
    rules = []
    for of, subject, limits in subjects:
        figures: list[tuple[Unit, int | None]] = [
            ("requests", limits.requests_per_minute),
            ("tokens", limits.tokens_per_minute),
        ]
        rules += [_Rule(of, unit, subject, limit) for unit, limit in figures if limit is not None]
    return rules


def _refusal(rules: list[_Rule], verdict: Verdict) -> errors.RateLimited:
    """Of the rules that refused, the one that will do so for longest."""
    rule, figure = max(
        zip(rules, verdict.figures, strict=True),
        key=lambda pair: math.inf if pair[1].wait_s is None else pair[1].wait_s,
    )
    owner = "API key" if rule.of == "key" else "tenant"
    if figure.wait_s is None:
        message = f"The request alone is more than the {owner}'s {rule.unit} per minute."
        error = errors.RateLimited(message, is_permanent=True)
        error.retry_after_s = None
        return error
    return errors.RateLimited(f"The {owner}'s {rule.unit} per minute are used up.", retry_after_s=figure.wait_s)


def _policy(caller: ApiKey) -> str:
    """The IETF draft's list of quotas: `q` units per `w` seconds."""
    quotas = []
    for of, limits in (("key", caller.limits), ("tenant", caller.tenant_limits)):
        known = [
            ("requests", limits.requests_per_minute, ";w=60"),
            ("tokens", limits.tokens_per_minute, ';w=60;qu="tokens"'),
            ("concurrent", limits.max_concurrent, ';qu="concurrent-requests"'),
            ("daily-tokens", limits.daily_tokens, ';w=86400;qu="tokens"'),
            ("daily-cost", limits.daily_cost_nano, ';w=86400;qu="nano-cost"'),
        ]
        quotas += [f'"{of}-{name}";q={limit}{rest}' for name, limit, rest in known if limit is not None]
    return ", ".join(quotas)


def _standing(rules: list[_Rule], verdict: Verdict) -> str:
    return ", ".join(
        f'"{rule.of}-{rule.unit}";r={figure.remaining};t={math.ceil(figure.reset_s)}'
        for rule, figure in zip(rules, verdict.figures, strict=True)
    )


def _openai(unit: str, figure: Figure) -> Headers:
    values = {"limit": str(figure.limit), "remaining": str(figure.remaining), "reset": duration(figure.reset_s)}
    return [(f"x-ratelimit-{name}-{unit}".encode(), value.encode()) for name, value in values.items()]


def duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60}s"
