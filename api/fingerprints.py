"""Hashes of what was asked: under which key an answer is cached, and whether two requests are the same."""

import hashlib

import orjson

from api.schemas.batches import BatchRequest
from api.wishes import Wish
from catalog import ModelSpec
from tasks.call import Call

_KEY_VERSION = b"switchyard-cache-1\0"
_CANONICAL = orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS


def cache_key(call: Call, model: ModelSpec, tenant: str) -> bytes:
    """SHA-256 over everything that changes the answer, and whose it is."""
    entry = model.entry
    scope = [tenant, model.name, model.revision, model.context_length, entry.default_max_tokens, entry.mask]
    canonical = orjson.dumps([scope, call.canonical()], option=_CANONICAL)
    return hashlib.sha256(_KEY_VERSION + canonical).digest()


def batch(wanted: BatchRequest) -> bytes:
    """As `request`, for POST /v1/batches; no job's is the same."""
    return hashlib.sha256(orjson.dumps(["batch", wanted.model_dump()], option=_CANONICAL)).digest()


def request(call: Call, wish: Wish) -> bytes:
    """SHA-256 of what was asked, however it was spelled."""
    asked = [
        call.canonical(),
        call.model,
        call.stream,
        call.include_usage,
        wish.metadata,
        wish.timeout_s,
        wish.deadline,
        wish.priority,
        # Only where given, so that keys of requests from before these existed still fit.
        *([wish.webhook, wish.result_ttl_s] if wish.webhook or wish.result_ttl_s else []),
    ]
    return hashlib.sha256(orjson.dumps(asked, option=_CANONICAL)).digest()
