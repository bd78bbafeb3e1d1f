"""The product's own code, led over simulated surroundings: each function is a copy with other globals.

What runs here is `tasks.reconciler.reconcile_once`, `tasks.inference.run` and `enqueue`, and the parts of
`tasks.worker.Worker` and `tasks.gate.Gate` that decide: line for line what production runs. Only names of the outside world are
replaced: the ledger, the clock, asyncio's current task, logs and metrics.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from backends.base import BackendDead, BackendError, InvalidCall
from tasks import gate, inference, reconciler, worker
from tasks.call import VERSION
from tests.simulation.kernel import Exit, Kernel, Session, Sleep, Statement, Task, Until
from tests.simulation.store import SimStore

__all__ = ["VERSION", "Product", "Unanswered"]


class Unanswered(Exception):
    """`reconcile_once` asked something that it has no answer to yet."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments


class Answers:
    """The cursor of a pass that is played again and again: known answers come from the record, and the first
    question without one ends the pass. So other processes run between any two of its statements."""

    def __init__(self) -> None:
        self.record: list[Any] = []
        self._next = 0

    def rewind(self) -> "Answers":
        self._next = 0
        return self

    def ask(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if self._next == len(self.record):
            raise Unanswered(name, arguments)
        self._next += 1
        return self.record[self._next - 1]


class Recorded:
    """In place of the modules of `db`."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        getattr(SimStore, name)  # a statement that the store lacks must fail loudly

        def ask(cursor: Answers, *arguments: Any) -> Any:
            return cursor.ask(name, arguments)

        setattr(self, name, ask)
        return ask


class Silent:
    """A log, or a metric, that nobody reads."""

    def __getattr__(self, name: str) -> "Silent":
        return self

    def __call__(self, *_: Any, **__: Any) -> "Silent":
        return self


@dataclass(slots=True)
class SimCall:
    """What a job's payload says: how its computation goes."""

    kind: str
    model: str = "m"

    @classmethod
    def decode(cls, payload: bytes) -> "SimCall":
        return cls(payload.decode())


async def compute(owner: Any, attempt: Any) -> bytes:
    """In place of the model. The body names the attempt that made it."""
    rng, job, kind = owner.kernel.rng, attempt.job, attempt.call.kind
    for _ in range(1 if kind == "quick" else 3):
        await Sleep(rng.random() * (0.2 if kind == "quick" else 2))
    chance = rng.random()
    if kind == "poison":
        owner.kernel.count("poison")
        await Exit()
    if kind == "invalid":
        raise InvalidCall("refused")
    if kind == "broken" or (kind == "flaky" and chance < 0.5):
        raise BackendError("failed")
    if kind == "flaky" and chance < 0.6:
        raise BackendDead("dead")
    if kind == "flaky" and chance < 0.7:
        raise ZeroDivisionError
    return b"%d:%d:%d" % (job.id.int, owner.id, job.run)


class Event:
    """In place of `asyncio.Event`."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._is_set = False
        self._waiting: dict[Task, bool] = {}
        """Whether it was set since the task came to wait."""

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        for task in self._waiting:
            self._waiting[task] = True
            self._kernel.wake(task)

    def clear(self) -> None:
        self._is_set = False

    async def wait(self) -> None:
        if self._is_set:
            return
        task = self._kernel.current
        assert task is not None
        self._waiting[task] = False
        try:
            await Until(lambda: self._waiting[task])
        finally:
            del self._waiting[task]


class Lock:
    """In place of `asyncio.Lock`."""

    def __init__(self, kernel: Kernel) -> None:
        self._is_free = Event(kernel)
        self._is_free.set()

    async def __aenter__(self) -> None:
        while not self._is_free.is_set():
            await self._is_free.wait()
        self._is_free.clear()

    async def __aexit__(self, *_: object) -> None:
        self._is_free.set()


class Product:
    """The copies for one schedule."""

    def __init__(self, kernel: Kernel) -> None:
        silent = Silent()
        clock = SimpleNamespace(monotonic=lambda: kernel.now, time_ns=lambda: int(kernel.now * 1e9))
        tasks = SimpleNamespace(current_task=lambda: kernel.current, CancelledError=asyncio.CancelledError)
        self.inference = _led_over(
            inference, asyncio=tasks, time=clock, log=silent, metrics=silent, Call=SimCall, _compute=compute,
            celery=SimpleNamespace(message=lambda job_id, task, backend, level: job_id),
            usage_of=lambda call, outputs: {"prompt_tokens": 1, "completion_tokens": 1},
        )  # fmt: skip
        self.reconciler = _led_over(
            reconciler, job_views=Recorded(), recovery=Recorded(), flights=Recorded(), workers=Recorded(), log=silent
        )
        events = SimpleNamespace(Event=lambda: Event(kernel), Lock=lambda: Lock(kernel))
        globals_of_gate = {**vars(gate), "asyncio": events}
        passages = {
            name: contextlib.asynccontextmanager(_copy(vars(gate.Gate)[name].__wrapped__, globals_of_gate))
            for name in ("together", "alone")
        }
        self.Gate = type("Gate", (), {"__init__": _copy(vars(gate.Gate)["__init__"], globals_of_gate), **passages})
        globals_of_worker = {**vars(worker), "log": silent, "time": clock, "inference": self.inference}
        self.worker = SimpleNamespace(
            **{
                name: _copy(function, globals_of_worker)
                for name, function in vars(worker.Worker).items()
                if isinstance(function, FunctionType)
            }
        )

    async def reconcile(self, owner: Any, session: Session, queues: reconciler.Queues, config: Any,
                        backends: list[str]) -> reconciler.Report:  # fmt: skip
        """One pass of the real `reconcile_once`, statement by statement."""
        answers = Answers()
        while True:
            try:
                report: reconciler.Report = self.reconciler.reconcile_once(answers.rewind(), queues, config, backends)
            except Unanswered as asked:
                answers.record.append(await Statement(owner, asked.name, *asked.arguments, session=session))
            else:
                return report


def _led_over(module: ModuleType, **names: Any) -> SimpleNamespace:
    """The module's functions with these names replaced, in each other's sight."""
    space = {**vars(module), **names}
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) and value.__module__ == module.__name__ and name not in names:
            space[name] = _copy(value, space)
    return SimpleNamespace(**space)


def _copy(function: FunctionType, space: dict[str, Any]) -> FunctionType:
    twin = FunctionType(function.__code__, space, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin
