"""The limiter: against a model that keeps every take, over several processes, and without Redis."""

import asyncio
import bisect
import multiprocessing
import time
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks import transport
from tasks.limiter import Ask, Limiter, Verdict, Window

WINDOW_MS, SLOTS = 6000, 60
WIDTH = WINDOW_MS // SLOTS


class Model:
    """Every take that was let through, kept for ever."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken: list[tuple[int, int]] = []

    def count(self, now: int) -> int:
        return sum(amount for at, amount in self.taken if at // WIDTH >= now // WIDTH - SLOTS)

    def fits(self, now: int, amount: int) -> bool:
        return self.count(now) + amount <= self.limit

    def between(self, start: int, end: int) -> int:
        return sum(amount for at, amount in self.taken if start <= at <= end)


steps = st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 2), st.integers(0, 40)), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps, limits=st.tuples(st.integers(1, 6), st.integers(1, 60)), start=st.integers(0, 10**7))
def test_redis_and_memory_let_through_what_the_model_does(
    redis_url: str, steps: list[tuple[int, int, int]], limits: tuple[int, int], start: int
) -> None:
    name = uuid.uuid4().hex
    models = [Model(limit) for limit in limits]
    windows = [Window(WINDOW_MS, SLOTS) for _ in limits]

    async def play() -> None:
        connection = transport.connect(redis_url)
        limiter = Limiter(connection, window_s=WINDOW_MS / 1000, slots=SLOTS, patience_s=30)
        now = start
        for passed, *amounts in steps:
            now += passed
            asks = [
                Ask(f"{name}:{at}", limit, amount)
                for at, (limit, amount) in enumerate(zip(limits, amounts, strict=True))
            ]
            verdict = await limiter.take(asks, now)
            assert not verdict.is_degraded
            seen = [window.look(now, ask.limit, ask.amount) for window, ask in zip(windows, asks, strict=True)]
            fits = [model.fits(now, ask.amount) for model, ask in zip(models, asks, strict=True)]
            assert [fit for fit, _ in seen] == fits
            assert verdict.is_allowed == all(fits)
            for model, window, ask, figure, (_, own) in zip(models, windows, asks, verdict.figures, seen, strict=True):
                if verdict.is_allowed:
                    model.taken.append((now, ask.amount))
                    window.add(now, ask.amount)
                assert figure.remaining == max(ask.limit - model.count(now), 0)
                if not model.fits(now, ask.amount) and not verdict.is_allowed:
                    check_wait(model, now, ask.amount, figure.wait_s)
                    assert own.wait_s == figure.wait_s
                # No window holds more than the limit; what is refused would overfill one that is a slot longer.
                assert model.between(now - WINDOW_MS, now) <= ask.limit
                if not verdict.is_allowed and not model.fits(now, ask.amount):
                    assert model.between(now - WINDOW_MS - WIDTH, now) + ask.amount > ask.limit
        await connection.aclose()

    asyncio.run(play())


def check_wait(model: Model, now: int, amount: int, wait_s: float | None) -> None:
    """It fits then, and not a moment earlier."""
    if amount > model.limit:
        assert wait_s is None
        return
    assert wait_s is not None
    then = now + round(wait_s * 1000)
    assert model.fits(then, amount)
    assert not model.fits(then - 1, amount)


def _hammer(
    url: str, name: str, limit: int, window_s: float, seconds: float, results: "multiprocessing.Queue[list[float]]"
) -> None:
    async def play() -> list[float]:
        connection = transport.connect(url)
        limiter = Limiter(connection, num_processes=4, window_s=window_s, patience_s=30)
        accepted: list[float] = []
        end = time.time() + seconds
        while time.time() < end:
            verdict = await limiter.take([Ask(name, limit, 1)])
            assert not verdict.is_degraded
            if verdict.is_allowed:
                accepted.append(time.time())
            else:
                await asyncio.sleep(0.005)
        await connection.aclose()
        return accepted

    results.put(asyncio.run(play()))


@pytest.mark.slow
def test_four_processes_together_keep_to_the_limit_in_any_window(redis_url: str) -> None:
    limit, window_s, seconds = 400, 3.0, 10.0
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[list[float]] = context.Queue()
    arguments = (redis_url, uuid.uuid4().hex, limit, window_s, seconds, results)
    processes = [context.Process(target=_hammer, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    accepted = sorted(at for _ in processes for at in results.get(timeout=60))
    for process in processes:
        process.join()
    most = max(number - bisect.bisect_left(accepted, at - window_s) + 1 for number, at in enumerate(accepted))
    assert most <= limit * 1.02
    # A window that slides by a slot too many lets 60 of 61 through.
    assert len(accepted) >= limit * int(seconds / window_s) * 0.95


async def take(limiter: Limiter, *asks: Ask) -> Verdict:
    return await limiter.take(asks)


async def test_without_redis_a_process_keeps_to_its_share(redis_url: str) -> None:
    broken = transport.connect("redis://127.0.0.1:1/0")
    limiter = Limiter(broken, num_processes=4)
    verdicts = [await take(limiter, Ask("a", 10, 1)) for _ in range(4)]
    assert [verdict.is_allowed for verdict in verdicts] == [True, True, False, False]
    assert all(verdict.is_degraded for verdict in verdicts)
    assert [verdict.figures[0].limit for verdict in verdicts] == [2] * 4
    assert (await take(limiter, Ask("small", 1, 1))).is_allowed
    assert not (await take(limiter, Ask("none", 0, 1))).is_allowed
    assert not (await take(limiter, Ask("b", 100, 1), Ask("a", 10, 1))).is_allowed
    assert (await take(limiter, Ask("b", 100, 25))).is_allowed, "what was refused together was not taken in part"
    await broken.aclose()


async def test_when_redis_goes_a_process_knows_what_it_let_through(redis_url: str) -> None:
    connection = transport.connect(redis_url)
    name = uuid.uuid4().hex
    limiter = Limiter(connection, num_processes=2)
    for _ in range(5):
        assert (await take(limiter, Ask(name, 10, 1))).is_allowed
    limiter._failed_at = time.monotonic()
    verdict = await take(limiter, Ask(name, 10, 1))
    assert (verdict.is_allowed, verdict.is_degraded) == (False, True)
    await connection.aclose()


async def test_a_redis_that_hangs_is_not_waited_for(redis_url: str) -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(never, "127.0.0.1", 0)
    hanging = transport.connect(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
    limiter = Limiter(hanging)
    started = time.monotonic()
    for _ in range(10):
        assert (await take(limiter, Ask("a", 100, 1))).is_degraded
    assert time.monotonic() - started < 2.0
    await hanging.aclose()
    server.close()
    await server.wait_closed()
