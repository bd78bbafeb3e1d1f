"""A schedule of the whole system in one thread: what callers ask of it, what befalls it, and when it is at peace."""

import functools
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from db.accept import Idempotency, NewJob
from db.states import TERMINAL
from tests.simulation.audit import Audit
from tests.simulation.broker import Redis
from tests.simulation.kernel import Kernel
from tests.simulation.processes import CONFIG, Client, Gateway, Reconciler, Worker
from tests.simulation.product import Product
from tests.simulation.store import SimStore

MAX_JOBS = 10
_API_KEYS = {tenant: uuid.UUID(int=number) for number, tenant in enumerate("ab", 1)}
SETTLE_S = 120.0
"""With faults off, everything ends within this."""
KINDS = ("quick", "quick", "quick", "slow", "slow", "flaky", "flaky", "broken", "invalid", "poison")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a world is made of. A mutant replaces one part."""

    store: type[SimStore] = SimStore
    gateway: type[Gateway] = Gateway
    worker: type[Worker] = Worker
    reconciler: type[Reconciler] = Reconciler


REAL = Parts()


class World(Kernel):
    """One schedule: faults for `num_steps`, then peace until everything has ended."""

    def __init__(self, seed: int, parts: Parts = REAL, *, is_traced: bool = False) -> None:
        super().__init__(seed, parts.store(), is_traced=is_traced)
        rng = self.rng
        self.backends = ["echo", "bert"] if rng.random() < 0.3 else ["echo"]
        self.has_one_leader = rng.random() < 0.7
        self.audit = Audit(self.store, CONFIG.max_attempts, CONFIG.heartbeat_s)
        self.product = Product(self)
        self.redis = Redis(self)
        self._num_jobs = 0
        self._arrivals = rng.choice((0.05, 0.1, 0.2))
        for number in range(rng.choice((2, 3))):
            parts.gateway(self, f"gateway{number}")
        for number in range(max(len(self.backends), rng.choice((1, 2, 3, 4)))):
            parts.worker(self, f"worker{number}")
        for number in range(2):
            parts.reconciler(self, f"reconciler{number}")

    @property
    def workers(self) -> list[Worker]:
        return [process for process in self.processes if isinstance(process, Worker)]

    def backend_of(self, worker: str) -> str:
        return self.backends[int(worker.removeprefix("worker")[0]) % len(self.backends)]

    def run(self, num_steps: int) -> None:
        """Raises Violation."""
        try:
            for _ in range(num_steps):
                if self._num_jobs < MAX_JOBS and self.rng.random() < self._arrivals:
                    self._arrive()
                self.step()
            self._calm()
            until = self.now + SETTLE_S
            while self.now < until and not self._is_quiet():
                for _ in range(20):
                    self.step()
            self.audit.finish(self._is_quiet())
        finally:
            self.close()

    def follow(self, client: Client, job_id: uuid.UUID) -> None:
        """What a caller does once its job is accepted."""
        for after in client.polls:
            self.later(after, lambda: self._ask(lambda gateway: gateway.read(job_id)))
        if client.cancels_after is not None:
            self.later(
                client.cancels_after,
                lambda: self._ask(lambda gateway: gateway.cancel(job_id, client.job.tenant)),
            )

        for after in client.retries:
            self.later(after, lambda: self._ask(lambda gateway: gateway.retry(job_id, client.job.tenant)))

    def after_statement(self, name: str, arguments: tuple[Any, ...], answer: Any) -> None:
        if name == "finish" and None in answer:
            self.count("fenced_result")
        self.audit.after_statement(name, arguments, answer)

    def inflict(self, fault: str) -> None:
        rng, process = self.rng, self.rng.choice(self.processes) if self.processes else None
        if fault == "postgres_crash":
            self._crash_postgres()
        elif fault == "redis_wiped":
            self.redis.wipe()
        elif fault == "redis_away":
            self.redis.away_until = self.now + rng.random() * 4
        elif fault == "stall":
            self.store.now += rng.random() * 4
        elif process is None:
            return
        elif fault == "crash":
            self.end(process)
        elif fault == "hang":
            process.hung_until = max(process.hung_until, self.now + rng.random() * 9)
        elif fault == "freeze":
            process.hung_until = math.inf
            process.rebirth(f"{process.name}.{len(self.processes)}")
        elif fault == "session_cut":
            if not process.sessions:
                return
            self.store.unlock(process.sessions[0])
            process.sessions.clear()
        elif fault == "stop":
            if not isinstance(process, Worker) or process.state != "ready" or process.is_leaving:
                return
            process.is_leaving = True
            process.spawn("drain", process.drain())
        name = (
            f" of {process.name}"
            if process is not None and fault in ("crash", "hang", "freeze", "session_cut", "stop")
            else ""
        )
        self.note(f"*** {fault}{name}")
        self.coverage[fault] += 1

    def _crash_postgres(self) -> None:
        undone = self.store.crash(self.rng)
        if undone:
            self.count("commits_taken_back")
        self.audit.resume(undone)
        for process in self.processes:
            process.sessions.clear()

    def _arrive(self) -> None:
        """A new request, and where it has a key, the same again, or another by mistake, sooner or later."""
        rng = self.rng
        kind, tenant = rng.choice(KINDS).encode(), rng.choice("ab")
        if rng.random() < 0.85:
            self._send(kind, tenant, None)
            return
        key = Idempotency(_API_KEYS[tenant], f"k{self._num_jobs}", kind)
        self._send(kind, tenant, key)
        for _ in range(rng.choice((1, 2))):
            other = b"other" if rng.random() < 0.2 else kind
            again = functools.partial(self._send, kind, tenant, Idempotency(key.api_key_id, key.key, other))
            self.later(rng.random() * rng.choice((0.2, 6)), again)

    def _send(self, kind: bytes, tenant: str, key: Idempotency | None) -> None:
        rng = self.rng
        self._num_jobs += 1
        job = NewJob(
            id=uuid.UUID(int=rng.getrandbits(32) << 8 | self._num_jobs),
            tenant=tenant, api_key_id=None, request_id="r", endpoint="/v1/completions", task="generate",
            requested_model="m", model="m", model_revision="1", backend=rng.choice(self.backends), is_stream=False,
            payload=kind, metadata=None, decision="{}", cache_verdict="MISS", cache_key=None,
            cache_ttl_s=None, is_cache_refresh=False, prompt_tokens=1, timings="{}",
            timeout_s=rng.choice((None, None, None, 2.0, 10.0)),
            coalesce_key=kind if rng.random() < 0.5 else None,
        )  # fmt: skip
        # A request with a key is on the disk before its answer, whoever waits for it.
        client = Client(job, is_promised=key is not None or rng.random() < 0.7, key=key)
        client.polls = [rng.random() * 8 for _ in range(rng.choice((0, 1, 2)))]
        if rng.random() < 0.25:
            client.cancels_after = rng.random() * rng.choice((1, 6))
        client.retries = [rng.random() * 12 for _ in range(rng.choice((0, 0, 1, 3, 8)))]
        if key is not None:
            self.audit.ask(key, job.id)
        self._ask(lambda gateway: gateway.submit(client))

    def _ask(self, request: Callable[[Gateway], Any]) -> None:
        """Send a request to one of the gateways, if one is up."""
        up = [process for process in self.processes if isinstance(process, Gateway) and process.is_serving]
        if up:
            gateway = self.rng.choice(up)
            gateway.spawn("request", request(gateway))

    def _calm(self) -> None:
        """Faults are over. What hangs comes back, what is away returns."""
        self.note("*** no more faults")
        self.is_faulty = False
        self.redis.away_until = 0.0

    def _is_quiet(self) -> bool:
        return all(row.status in TERMINAL for row in self.store.jobs.values()) and not any(
            worker._runs for worker in self.workers if worker.hung_until < math.inf
        )
