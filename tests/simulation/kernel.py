"""One thread, one seed, one schedule: tasks, what they wait for, and the faults that meet them.

Every process is a set of coroutines. Each `await` ends in an `Operation`; the kernel picks a task by chance,
performs its operation, and delivers the answer in the same step or in a later one, so that a crash can fall
before a statement, between its commit and the news of it, or after. Time is simulated and skips what is idle.
"""

import asyncio
import functools
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from random import Random
from typing import Any

import psycopg2

from tests.simulation.store import SimStore

STEP_S = 0.02
"""Mean time that a step takes."""

PARKED = object()
"""An operation's answer is still to come; whoever has it wakes the task."""


class Away(Exception):
    """Redis did not answer."""


class Violation(Exception):
    """An invariant does not hold: (its name, what was seen)."""


class Operation:
    """What a task waits for."""

    __slots__ = ()

    def __await__(self) -> Generator["Operation", Any, Any]:
        return (yield self)

    def perform(self, kernel: "Kernel", task: "Task") -> Any:
        raise NotImplementedError


class Sleep(Operation):
    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Until(Operation):
    """Until the condition holds; whoever makes it hold wakes the task."""

    __slots__ = ("condition",)

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.condition = condition

    def perform(self, kernel: "Kernel", task: "Task") -> Any:
        return None if self.condition() else PARKED


class Exit(Operation):
    """The process ends itself."""

    __slots__ = ()

    def perform(self, kernel: "Kernel", task: "Task") -> Any:
        kernel.end(task.process)
        return PARKED


@dataclass(eq=False, slots=True)
class Session:
    """A connection to Postgres that lasts, and with it its locks."""

    spoke_at: float = 0.0


class Statement(Operation):
    """A statement on its way to the ledger. It may be lost before it runs, and its answer after it ran."""

    __slots__ = ("arguments", "has_run", "is_durable", "name", "process", "session")

    def __init__(self, process: "Process", name: str, *arguments: Any, session: Session | None = None,
                 is_durable: bool = True) -> None:  # fmt: skip
        self.process, self.name, self.arguments = process, name, arguments
        self.session, self.is_durable = session, is_durable
        self.has_run = False

    def perform(self, kernel: "Kernel", task: "Task") -> Any:
        if self.session is not None and self.session not in self.process.sessions:
            raise psycopg2.OperationalError("the session is gone")
        draw, faults = kernel.rng.random() if kernel.is_faulty else 1.0, kernel.faults
        if draw < faults.statement_lost:
            self._cut(kernel, "statement_lost")
        draw -= faults.statement_lost
        if self.session is None and draw < faults.statement_late:
            # Whoever asked cut a connection that was silent for too long. Postgres has the statement all the same.
            kernel.later(kernel.rng.choice((0.1, 1.0, 3.0, 8.0)), functools.partial(kernel.run_late, self.twin()))
            self._cut(kernel, "statement_late")
        answer = self.run(kernel)
        if draw < faults.statement_late + faults.answer_lost:
            self._cut(kernel, "answer_lost")
        return answer

    def twin(self) -> "Statement":
        return Statement(self.process, self.name, *self.arguments, is_durable=self.is_durable)

    def run(self, kernel: "Kernel") -> Any:
        self.has_run = True
        store = kernel.store
        if self.session is not None:
            self.session.spoke_at = kernel.now
        store.begin(self.session, is_durable=self.is_durable, caller_now=kernel.now + self.process.skew_s)
        answer = getattr(store, self.name)(*self.arguments)
        kernel.after_statement(self.name, self.arguments, answer)
        return answer

    def _cut(self, kernel: "Kernel", fault: str) -> None:
        kernel.count(fault)
        if self.session is not None:
            kernel.store.unlock(self.session)
            self.process.sessions.clear()
        raise psycopg2.OperationalError(fault)


class Task:
    """A coroutine of a process. `cancel` is asyncio's: CancelledError at the place where it waits."""

    __slots__ = ("answer", "coroutine", "error", "is_answered", "is_cancelled", "is_done", "is_queued", "name",
                 "number", "operation", "process")  # fmt: skip

    def __init__(self, process: "Process", name: str, coroutine: Coroutine[Operation, Any, None]) -> None:
        self.process, self.name, self.coroutine = process, name, coroutine
        self.operation: Operation | None = None
        self.answer: Any = None
        self.error: BaseException | None = None
        self.is_answered = self.is_cancelled = self.is_done = False
        self.is_queued = True
        self.number = 0
        """Of its last sleep: an earlier alarm does not wake it."""

    def cancel(self) -> None:
        self.is_cancelled = True
        self.process.kernel.wake(self)

    def done(self) -> bool:
        return self.is_done


class Process:
    """One life of an operating system process."""

    def __init__(self, kernel: "Kernel", name: str) -> None:
        self.kernel, self.name = kernel, name
        self.is_alive = True
        self.hung_until = 0.0
        self.skew_s = kernel.rng.choice((0.0, 0.0, -3600.0, 3600.0))
        # Not a set: a task's hash is its address, and a seed must mean one order in every process.
        self.tasks: dict[Task, None] = {}
        self.sessions: list[Session] = []
        kernel.processes.append(self)
        self.spawn("main", self.main())

    async def main(self) -> None:
        raise NotImplementedError

    def rebirth(self, name: str) -> None:
        """A supervisor starts a process in this one's place."""
        type(self)(self.kernel, name)

    def spawn(self, name: str, coroutine: Coroutine[Operation, Any, None]) -> Task:
        task = Task(self, name, coroutine)
        self.tasks[task] = None
        self.kernel.ready.append(task)
        return task

    def on_end(self) -> None:
        """What the world sees of the end of this life."""


@dataclass(slots=True)
class Faults:
    """Chances, per step or per operation. A schedule draws which of them it has at all."""

    crash: float = 0.01
    hang: float = 0.006
    freeze: float = 0.001
    stop: float = 0.004
    session_cut: float = 0.006
    postgres_crash: float = 0.002
    redis_wiped: float = 0.004
    redis_away: float = 0.004
    stall: float = 0.006
    statement_lost: float = 0.04
    statement_late: float = 0.05
    answer_lost: float = 0.06
    message_dropped: float = 0.2
    message_doubled: float = 0.2
    message_delayed: float = 0.2
    message_reordered: float = 0.3

    @classmethod
    def drawn(cls, rng: Random) -> "Faults":
        faults = cls()
        for name in cls.__slots__:
            setattr(faults, name, getattr(faults, name) * rng.choice((0, 0, 0.5, 1, 2)))
        return faults


PER_STEP = ("crash", "hang", "freeze", "stop", "session_cut", "postgres_crash", "redis_wiped", "redis_away", "stall")


class Kernel:
    """The schedule. `inflict` and `after_statement` are the world's."""

    def __init__(self, seed: int, store: SimStore, *, is_traced: bool = False) -> None:
        self.rng = Random(seed)
        self.store = store
        self.faults = Faults.drawn(self.rng)
        self._fault_chance = sum(getattr(self.faults, name) for name in PER_STEP)
        self.is_faulty = True
        self.ready: list[Task] = []
        self.processes: list[Process] = []
        self.coverage: Counter[str] = Counter()
        self.trace: list[str] | None = [] if is_traced else None
        self.num_steps = 0
        self.current: Task | None = None
        self._alarms: list[tuple[float, int, Task | None, Callable[[], None] | None]] = []
        self._numbers = itertools.count(1)

    @property
    def now(self) -> float:
        return self.store.now

    def after_statement(self, name: str, arguments: tuple[Any, ...], answer: Any) -> None:
        raise NotImplementedError

    def inflict(self, fault: str) -> None:
        raise NotImplementedError

    def count(self, what: str) -> None:
        self.coverage[what] += 1
        if self.trace is not None:
            self.trace.append(f"{self.now - 1_000_000:9.3f}  {what}")

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now - 1_000_000:9.3f}  {text}")

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._alarms, (self.now + seconds, next(self._numbers), None, call))

    def wake(self, task: Task) -> None:
        if not task.is_queued and not task.is_done and task.process.is_alive:
            task.is_queued = True
            self.ready.append(task)

    def step(self) -> None:
        """One task goes one operation further."""
        self.num_steps += 1
        rng = self.rng
        self.store.now += rng.random() * 2 * STEP_S
        if self._alarms and self._alarms[0][0] <= self.store.now:
            self._ring()
        if self.is_faulty and rng.random() < self._fault_chance:
            self._strike()
        while not self.ready:
            self.store.now = max(self.store.now, self._alarms[0][0])
            self._ring()
        ready = self.ready
        index = int(rng.random() * len(ready))
        task, ready[index] = ready[index], ready[-1]
        ready.pop()
        task.is_queued = False
        if task.process.hung_until > self.store.now:
            self._sleep(task, task.process.hung_until)
        else:
            self._advance(task)

    def end(self, process: Process) -> None:
        """The process is gone. What it had sent to Postgres may still run there, at once or much later."""
        process.is_alive = False
        self.processes.remove(process)
        self.ready = [task for task in self.ready if task.process is not process]
        process.on_end()
        for task in process.tasks:
            statement = task.operation
            if task is not self.current:
                task.coroutine.close()
            if self.is_faulty and isinstance(statement, Statement) and self._is_under_way(statement):
                self.later(self.rng.choice((0.0, 0.5, 5.0)), functools.partial(self.run_late, statement))
        # A host that vanishes, unlike a process that dies, leaves its locks to a time-out.
        linger_s = 6.0 if self.is_faulty and self.rng.random() < 0.2 else 0.0
        self.later(linger_s, lambda: self._unlock(process.sessions))
        self.later(self.rng.random() * 2, functools.partial(process.rebirth, process.name))

    def _unlock(self, sessions: list[Session]) -> None:
        for session in sessions:
            self.store.unlock(session)

    def close(self) -> None:
        """No coroutine is left to the garbage collector."""
        for process in self.processes:
            for task in process.tasks:
                task.coroutine.close()

    def _is_under_way(self, statement: Statement) -> bool:
        is_of_a_session = statement.name in ("hold_lock", "try_lock", "register")
        return not statement.has_run and not is_of_a_session and self.rng.random() < 0.3

    def run_late(self, statement: Statement) -> None:
        self.count("statement_outlived_its_process")
        statement.run(self)

    def _strike(self) -> None:
        (fault,) = self.rng.choices(PER_STEP, [getattr(self.faults, name) for name in PER_STEP])
        self.inflict(fault)

    def _ring(self) -> None:
        alarms, now = self._alarms, self.store.now
        while alarms and alarms[0][0] <= now:
            _, number, task, call = heapq.heappop(alarms)
            if call is not None:
                call()
            elif task is not None and task.number == number:
                self.wake(task)

    def _sleep(self, task: Task, until: float) -> None:
        task.number = next(self._numbers)
        heapq.heappush(self._alarms, (until, task.number, task, None))

    def _advance(self, task: Task) -> None:
        if not task.is_cancelled and task.operation is not None and not task.is_answered:
            try:
                task.answer = task.operation.perform(self, task)
            except (psycopg2.OperationalError, Away) as error:
                task.error = error
            if self.trace is not None:
                self.note(self._described(task))
            if task.answer is PARKED:
                task.answer, task.is_answered = None, True
                return
            task.is_answered = True
            if self.is_faulty and self.rng.random() < 0.4:
                self.wake(task)
                return
        self._resume(task)

    def _resume(self, task: Task) -> None:
        answer, error = task.answer, task.error
        task.answer = task.error = None
        task.is_answered, task.number = False, 0
        self.current = task
        try:
            if task.is_cancelled:
                task.is_cancelled = False
                operation = task.coroutine.throw(asyncio.CancelledError())
            elif error is not None:
                operation = task.coroutine.throw(error)
            else:
                operation = task.coroutine.send(answer)
        except StopIteration:
            self._close(task)
        except asyncio.CancelledError:
            self.count("cancelled_as_it_ended")
            self._close(task)
        except psycopg2.OperationalError:
            # Where the real process has no handler it ends, and its supervisor starts another.
            self._close(task)
            self.end(task.process)
        else:
            task.operation = operation
            if isinstance(operation, Sleep):
                task.is_answered = True
                self._sleep(task, self.store.now + operation.seconds)
            else:
                self.wake(task)
        finally:
            self.current = None

    def _close(self, task: Task) -> None:
        task.is_done = True
        task.process.tasks.pop(task, None)

    def _described(self, task: Task) -> str:
        operation = task.operation
        text = type(operation).__name__
        if isinstance(operation, Statement):
            text = f"{operation.name}{operation.arguments}"
        answer = "later" if task.answer is PARKED else repr(task.error or task.answer)
        return f"{task.process.name}/{task.name}: {text} -> {answer}"
