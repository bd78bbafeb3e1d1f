"""The clients of a fault run, and the history of what they asked and were told.

Each operation leaves two lines in a JSONL file: `invoke`, and how it ended. `ok` is an answer, `fail` a refusal,
`info` neither (a reset, a timeout): the server may have done it or not. Echo answers with its prompt, and every
prompt holds a nonce, so the right answer to everything is known here.
"""

import asyncio
import dataclasses
import hashlib
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx

Answer = TypeVar("Answer")

TERMINAL = frozenset({"succeeded", "failed", "cancelled", "expired"})
_TIMEOUT_S = 15.0
"""Longer than any bound: a late answer is recorded as late, not as absent."""
_PATIENCE_S = 60.0
_TICK_S = 0.02
_ON_TIME_S = 0.01
"""A turn of the loop that is later than this is behind: there were too many answers to read at once."""


@dataclass(slots=True, kw_only=True)
class Record:
    """One line of the history. `at` is the harness's monotonic clock."""

    op: int
    type: Literal["invoke", "ok", "fail", "info"]
    kind: str
    at: float
    row: str = ""
    """The fault row that was being run."""
    url: str = ""
    tenant: str = ""
    nonce: str = ""
    key: str | None = None
    """Idempotency-Key."""
    request_sha256: str | None = None
    job_id: str | None = None
    status: int | None = None
    code: str | None = None
    state: str | None = None
    """The job's status, as the answer names it."""
    verdict: str | None = None
    """X-Cache."""
    is_replayed: bool = False
    sha256: str | None = None
    """Of the body of an answer."""
    text: str | None = None
    seconds: float = 0.0
    bound_s: float | None = None
    """How long the exchange may take."""
    behind_s: float = 0.0
    """For how long of it the harness's own loop ran behind: then it was not the server that was late."""
    retry_after: str | None = None
    allowed: list[int] = field(default_factory=list)
    """Statuses that are honest here beside 2xx, 429 and 503."""
    after: int = 0
    """Where this segment of a stream begins: Last-Event-ID."""
    ids: list[int] = field(default_factory=list)
    end: str | None = None
    """How a stream ended: `done`, the error's code, or None where it was cut."""
    error: str | None = None
    """What the client library raised."""
    num_messages: int | None = None
    """Of a `peek`: how many messages were in the queue."""


class History:
    """The file. Safe to append to from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.row = ""
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._ops = itertools.count(1)
        self.records: list[Record] = []

    def next_op(self) -> int:
        return next(self._ops)

    def add(self, record: Record) -> Record:
        record.row = record.row or self.row
        line = json.dumps(
            {name: value for name, value in dataclasses.asdict(record).items() if value not in (None, "", [])}
        )
        with self._lock:
            self._file.write(line + "\n")
            self._file.flush()
            self.records.append(record)
        return record

    def nemesis(self, what: str, url: str = "") -> None:
        """Something the harness did: `frozen` and `thawed` name a gateway that cannot answer meanwhile, between
        `severed` and `joined` gateways do not reach Postgres, or its table."""
        self.add(Record(op=0, type="info", kind=what, url=url, at=time.monotonic()))

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[Record]:
    """The records of a history file."""
    return [Record(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def prompt_of(nonce: str) -> str:
    """What is asked, and therefore what must be answered."""
    return f"job {nonce}: the right answer is {nonce}."


class Clients:
    """Users of a Switchyard, on an event loop in a thread of their own."""

    def __init__(self, history: History, urls: Sequence[str], secrets: Mapping[str, str], seed: int) -> None:
        self.history, self.urls, self.secrets = history, list(urls), dict(secrets)
        self.rng = random.Random(seed)
        self._seed = seed
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="clients", daemon=True)
        self._thread.start()
        self._http: httpx.AsyncClient = self.run(self._open())
        self._behind_s = 0.0
        """Altogether, by a clock that ticks on the loop."""
        self._loop.call_soon_threadsafe(self._tick, time.monotonic())
        self._arrivals: asyncio.Task[None] | None = None
        self._lives: set[asyncio.Task[Any]] = set()
        self._known: list[tuple[str, str]] = []
        """(tenant, job id) that another tenant may try to reach."""

    def _tick(self, due: float) -> None:
        now = time.monotonic()
        self._behind_s += max(now - due - _ON_TIME_S, 0.0)
        self._loop.call_at(self._loop.time() + _TICK_S, self._tick, now + _TICK_S)

    def run(self, work: Coroutine[Any, Any, Answer], within_s: float = 120) -> Answer:
        """Do `work` on the clients' loop and wait for it."""
        return self.begin(work).result(within_s)

    def begin(self, work: Coroutine[Any, Any, Answer]) -> "Future[Answer]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def start(self, rate: float, mix: Mapping[str, float]) -> None:
        """Let users arrive at `rate` a second, whatever becomes of those before them."""

        async def begin() -> None:
            self._arrivals = asyncio.create_task(self._arrive(rate, mix))

        self.run(begin())

    def stop(self, within_s: float = _PATIENCE_S) -> None:
        """No more arrivals; wait until everyone has left, and send home who is still there after that long."""

        async def end() -> None:
            if self._arrivals is not None:
                self._arrivals.cancel()
                await asyncio.gather(self._arrivals, return_exceptions=True)
                self._arrivals = None
            if self._lives:
                _, waiting = await asyncio.wait(self._lives, timeout=within_s)
                for life in waiting:
                    life.cancel()

        self.run(end(), within_s + 10)

    def close(self) -> None:
        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._http.aclose()

        self.run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def nonce(self) -> str:
        return f"{self._seed}-{next(self._numbers)}"

    # What one user does. Each may be run by a row by itself, as often as it likes.

    async def job(self, tenant: str = "default", token_ms: float = 0.0, **options: Any) -> str | None:
        """Submit, wait, read the result; the job's id if it was accepted."""
        nonce = self.nonce()
        made = await self.submit(nonce, tenant, {"token_ms": token_ms, **options})
        if made.job_id is None:
            return None
        state = await self.wait(made.job_id, nonce, tenant)
        if state == "succeeded":
            await self.result(made.job_id, nonce, tenant)
        return made.job_id

    async def ask(self, tenant: str = "default", token_ms: float = 0.0) -> Record:
        """One synchronous completion."""
        nonce = self.nonce()
        body = completion(nonce, {"token_ms": token_ms})
        return await self._exchange("ask", "POST", "/v1/completions", body, tenant, nonce=nonce, bound_s=None)

    async def cached(self, tenant: str = "default") -> Record:
        """One of few prompts, over and over, at temperature 0."""
        nonce = f"{self._seed}-again-{self.rng.randrange(5)}"
        body = {**completion(nonce, {}), "temperature": 0}
        return await self._exchange("cached", "POST", "/v1/completions", body, tenant, nonce=nonce, bound_s=None)

    async def stream(self, tenant: str = "default", token_ms: float = 15.0) -> Record:
        """Read a stream to its end, coming back with Last-Event-ID wherever it is cut."""
        nonce = self.nonce()
        op, url = self.history.next_op(), self._url()
        body = {**completion(nonce, {"token_ms": token_ms}), "stream": True}
        last = await self._segment(op, url, "POST", "/v1/completions", body, tenant, nonce, 0)
        deadline = time.monotonic() + _PATIENCE_S
        position = last.ids[-1] if last.ids else 0
        while last.end is None and last.job_id is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            job_id, url = last.job_id, self._other(url)
            last = await self._segment(op, url, "GET", f"/v1/jobs/{job_id}/stream", None, tenant, nonce, position)
            last.job_id = job_id
            position = last.ids[-1] if last.ids else position
        return last

    async def cancel(self, tenant: str = "default") -> str | None:
        """Submit something long, change one's mind, and see what became of it."""
        nonce = self.nonce()
        made = await self.submit(nonce, tenant, {"token_ms": 60})
        if made.job_id is None:
            return None
        await asyncio.sleep(self.rng.uniform(0, 1.5))
        path = f"/v1/jobs/{made.job_id}/cancel"
        await self._exchange("cancel", "POST", path, None, tenant, nonce=nonce, bound_s=1.0, allowed=[409],
                             job_id=made.job_id)  # fmt: skip
        await self.wait(made.job_id, nonce, tenant)
        return made.job_id

    async def keyed(self, tenant: str = "default", times: int = 5) -> set[str]:
        """Submit under an Idempotency-Key until it is answered and once more; then something else under it."""
        nonce = self.nonce()
        key, found = f"key-{nonce}", set[str]()
        answers = 0
        for _ in range(times):
            made = await self.submit(nonce, tenant, {}, key=key)
            if made.job_id is not None:
                found.add(made.job_id)
                answers += 1
            if answers == 2:
                break
            await asyncio.sleep(0.3)
        if found:
            await self.submit(nonce, tenant, {"token_ms": 1}, key=key, allowed=[422])
            await self.wait(min(found), nonce, tenant)
        return found

    async def foreign(self, tenant: str = "other") -> None:
        """Try to reach a job of another tenant, by every route that takes an id."""
        victims = [job_id for owner, job_id in self._known[-200:] if owner != tenant]
        if not victims:
            return
        victim, unknown = self.rng.choice(victims), "01900000-0000-7000-8000-000000000000"
        for method, suffix in (
            ("GET", ""),
            ("GET", "/result"),
            ("GET", "/stream"),
            ("GET", "/explain"),
            ("POST", "/cancel"),
        ):
            for job_id, kind in ((victim, "foreign"), (unknown, "unknown")):
                await self._exchange(kind, method, f"/v1/jobs/{job_id}{suffix}", None, tenant, allowed=[404],
                                     bound_s=1.0, nonce=suffix)  # fmt: skip

    async def submit(self, nonce: str, tenant: str, options: Mapping[str, Any], *, key: str | None = None,
                     allowed: Sequence[int] = (), url: str | None = None, timeout_s: float | None = None) -> Record:  # fmt: skip
        """POST /v1/jobs."""
        body: dict[str, Any] = {"endpoint": "/v1/completions", "body": completion(nonce, options)}
        if timeout_s is not None:
            body["timeout_s"] = timeout_s
        made = await self._exchange("submit", "POST", "/v1/jobs", body, tenant, nonce=nonce, bound_s=2.0, key=key,
                                    allowed=list(allowed), url=url)  # fmt: skip
        if made.job_id is not None:
            self._known.append((tenant, made.job_id))
        return made

    async def wait(self, job_id: str, nonce: str, tenant: str = "default", within_s: float = _PATIENCE_S) -> str | None:
        """Wait for the end, over any number of answers and failures; the final state, None if it never came."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            answer = await self._exchange("wait", "GET", f"/v1/jobs/{job_id}?wait=5", None, tenant, nonce=nonce,
                                          bound_s=6.0, job_id=job_id)  # fmt: skip
            if answer.state in TERMINAL:
                return answer.state
            if answer.type != "ok":
                await asyncio.sleep(0.2)
        return None

    async def result(self, job_id: str, nonce: str, tenant: str = "default") -> Record:
        """GET the answer, a few times if need be."""
        for _ in range(20):
            answer = await self._exchange("result", "GET", f"/v1/jobs/{job_id}/result", None, tenant, nonce=nonce,
                                          bound_s=1.0, job_id=job_id)  # fmt: skip
            if answer.type == "ok":
                break
            await asyncio.sleep(0.3)
        return answer

    async def retry(self, job_id: str, nonce: str, tenant: str = "default") -> Record:
        """Run a dead letter again."""
        return await self._exchange("retry", "POST", f"/v1/jobs/{job_id}/retry", None, tenant, nonce=nonce, bound_s=2.0,
                                    job_id=job_id, allowed=[409])  # fmt: skip

    async def _open(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=200, keepalive_expiry=5)
        return httpx.AsyncClient(timeout=_TIMEOUT_S, limits=limits)

    async def _arrive(self, rate: float, mix: Mapping[str, float]) -> None:
        users: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "job": lambda: self.job(self.rng.choice(list(self.secrets)), self.rng.choice((0, 2, 20))),
            "long": lambda: self.job(token_ms=40),
            "ask": lambda: self.ask(token_ms=self.rng.choice((0, 5))),
            "cached": self.cached,
            "stream": self.stream,
            "cancel": self.cancel,
            "keyed": self.keyed,
            "foreign": self.foreign,
        }
        due = time.monotonic()
        while True:
            name = self.rng.choices(list(mix), list(mix.values()))[0]
            life = asyncio.create_task(users[name]())
            self._lives.add(life)
            life.add_done_callback(self._lives.discard)
            due += 1 / rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    def _url(self) -> str:
        return self.rng.choice(self.urls)

    def _other(self, url: str) -> str:
        return self.rng.choice([other for other in self.urls if other != url] or self.urls)

    async def _exchange(self, kind: str, method: str, path: str, body: Any, tenant: str, *, nonce: str = "",
                        bound_s: float | None, key: str | None = None, allowed: list[int] | None = None,
                        job_id: str | None = None, url: str | None = None) -> Record:  # fmt: skip
        """One request, recorded from its beginning to its end."""
        url = url or self._url()
        content = None if body is None else json.dumps(body).encode()
        started = Record(
            op=self.history.next_op(), type="invoke", kind=kind, at=time.monotonic(), url=url, tenant=tenant, nonce=nonce,
            key=key, request_sha256=None if content is None else _sha256(content),
        )  # fmt: skip
        self.history.add(started)
        behind_s = self._behind_s
        ended = dataclasses.replace(started, type="info", bound_s=bound_s, allowed=allowed or [], job_id=job_id)
        headers = {"Authorization": f"Bearer {self.secrets[tenant]}", "Content-Type": "application/json"}
        if key is not None:
            headers["Idempotency-Key"] = key
        try:
            response = await self._http.request(method, url + path, content=content, headers=headers)
        except httpx.HTTPError as error:
            ended.error = type(error).__name__
        else:
            _describe(ended, response)
        ended.at = time.monotonic()
        ended.seconds, ended.behind_s = ended.at - started.at, self._behind_s - behind_s
        return self.history.add(ended)

    async def _segment(self, op: int, url: str, method: str, path: str, body: Any, tenant: str, nonce: str,
                       after: int) -> Record:  # fmt: skip
        """One connection's part of a stream."""
        started = Record(op=op, type="invoke", kind="stream", at=time.monotonic(), url=url, tenant=tenant, nonce=nonce,
                         after=after)  # fmt: skip
        self.history.add(started)
        ended = dataclasses.replace(started, type="info", ids=[])
        headers = {"Authorization": f"Bearer {self.secrets[tenant]}"}
        if after:
            headers["Last-Event-ID"] = str(after)
        parts: list[str] = []
        try:
            async with self._http.stream(method, url + path, json=body, headers=headers) as response:
                ended.status, ended.job_id = response.status_code, response.headers.get("x-job-id")
                if response.status_code != 200:
                    await response.aread()
                    _describe(ended, response)
                else:
                    ended.type = "ok"
                    async for line in response.aiter_lines():
                        _take(ended, parts, line)
        except httpx.HTTPError as error:
            ended.type, ended.error = "info", type(error).__name__
        ended.text = "".join(parts)
        ended.at = time.monotonic()
        ended.seconds = ended.at - started.at
        return self.history.add(ended)


def completion(nonce: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a completion whose answer is known."""
    asked = {name: value for name, value in options.items() if value}
    return {"model": "echo", "prompt": prompt_of(nonce), "max_tokens": 500, **({"options": asked} if asked else {})}


def _describe(record: Record, response: httpx.Response) -> None:
    """What the answer says."""
    record.status = response.status_code
    record.type = "ok" if response.status_code < 300 else "fail"
    record.job_id = response.headers.get("x-job-id") or record.job_id
    record.verdict = response.headers.get("x-cache")
    record.is_replayed = response.headers.get("idempotent-replayed") == "true"
    record.retry_after = response.headers.get("retry-after")
    record.sha256 = _sha256(response.content)
    try:
        body = response.json()
    except ValueError:
        return
    if response.status_code >= 300:
        record.code = (body.get("error") or {}).get("code")
    elif body.get("object") == "job":
        record.state, record.job_id = body["status"], body["id"]
    elif body.get("choices"):
        record.text = body["choices"][0]["text"]


def _take(record: Record, parts: list[str], line: str) -> None:
    """One line of server-sent events."""
    if line.startswith("id: "):
        record.ids.append(int(line[4:]))
    elif line == "data: [DONE]":
        # A second end would be one too many: the checker looks for exactly this word.
        record.end = "done" if record.end is None else f"{record.end} and done"
    elif line.startswith("data: "):
        frame = json.loads(line[6:])
        if "error" in frame:
            record.end = record.code = frame["error"]["code"]
        else:
            parts.extend(choice["text"] for choice in frame["choices"])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
