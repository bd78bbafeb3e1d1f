"""The request log: one row per answered request, written behind the answer."""

import dataclasses
import io
import operator
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from db import usage
from db.session import Cursor


@dataclass(slots=True, kw_only=True)
class Entry:
    """What is known of a request; filled in on its way through the gateway."""

    request_id: str
    endpoint: str
    job_id: uuid.UUID | None = None
    tenant: str | None = None
    api_key_id: uuid.UUID | None = None
    requested_model: str | None = None
    model: str | None = None
    backend: str | None = None
    cache_verdict: str | None = None
    is_stream: bool = False
    status_code: int = 0
    error_code: str | None = None
    duration_ms: float = 0.0
    queue_ms: float | None = None
    ttft_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt: str | None = None


_FIELDS = [field.name for field in dataclasses.fields(Entry)]
_COPY = f"COPY request_log ({', '.join(_FIELDS)}) FROM STDIN"
_values = operator.attrgetter(*_FIELDS)
_SPECIAL = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def append(cursor: Cursor, entries: Sequence[Entry]) -> list[None]:
    """Write the entries: by COPY, a third of the cost of INSERT at hundreds of rows."""
    lines = "".join("\t".join([_text(value) for value in _values(entry)]) + "\n" for entry in entries)
    cursor.copy_expert(_COPY, io.StringIO(lines))
    usage.add_hits(cursor, Counter(
        (one.tenant, one.api_key_id, one.model) for one in entries if one.cache_verdict == "HIT" and one.tenant
    ))  # fmt: skip
    return [None] * len(entries)


def _text(value: object) -> str:
    """A value in COPY's text format."""
    if value is None:
        return "\\N"
    if isinstance(value, str):
        return value.translate(_SPECIAL) if not value.isalnum() else value
    return str(value)


def purge(cursor: Cursor, older_than_s: float, limit: int = 5000) -> int:
    """Delete entries older than that; answers how many."""
    cursor.execute(
        """
        DELETE FROM request_log WHERE id IN (SELECT id FROM request_log
            WHERE created_at < clock_timestamp() - %s * interval '1 s' ORDER BY created_at LIMIT %s)
        """,
        (older_than_s, limit),
    )
    return cursor.rowcount
