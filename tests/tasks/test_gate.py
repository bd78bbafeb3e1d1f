"""Together or alone."""

import asyncio
import random

from tasks.gate import Gate


async def test_nobody_is_beside_who_passes_alone() -> None:
    gate, inside, most = Gate(), 0, 0
    rng = random.Random(1)

    async def pass_together() -> None:
        nonlocal inside, most
        async with gate.together():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(rng.random() / 500)
            inside -= 1

    async def pass_alone() -> None:
        nonlocal inside
        async with gate.alone():
            assert inside == 0
            inside += 1
            await asyncio.sleep(rng.random() / 500)
            assert inside == 1
            inside -= 1

    passing = [pass_alone() if rng.random() < 0.1 else pass_together() for _ in range(300)]
    async with asyncio.timeout(20):
        await asyncio.gather(*passing)
    assert most > 1


async def test_who_gives_up_waiting_leaves_the_gate_open() -> None:
    gate = Gate()
    async with gate.together():
        waiting = asyncio.create_task(_alone(gate))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        async with asyncio.timeout(1), gate.together():
            pass


async def _alone(gate: Gate) -> None:
    async with gate.alone():
        pass
