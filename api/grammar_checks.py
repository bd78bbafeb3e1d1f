"""Whether a grammar can be enforced at a bounded cost, asked before a job exists.

Compiling happens in processes of their own (`api.grammar_process`), two at most, which stay for the next question:
starting one takes 115 ms, asking it 1.4. What they said is remembered.
"""

import asyncio
import contextlib
import hashlib
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from pathlib import Path
from typing import Any

import orjson

from api import errors
from api.errors import APIError
from tasks.call import Call

_MAX_PROCESSES = 2
_MAX_KNOWN = 4_096
_PATIENCE_S = 10.0
"""For a free process, and then for its answer, on a machine however busy."""
_COSTLY: dict[str, Any] = {"is_valid": False, "is_costly": True}
_OVER_THE_GRAMMAR = {signal.SIGPROF, signal.SIGABRT, signal.SIGSEGV}
"""How a process ends that was given too much to do: out of time, of memory, of stack."""


class GrammarChecks:
    """The processes of one gateway. Made inside the event loop."""

    def __init__(self) -> None:
        self._idle: list[Process] = []
        self._all: set[Process] = set()
        self._turns = asyncio.Semaphore(_MAX_PROCESSES)
        self._known: OrderedDict[bytes, dict[str, Any]] = OrderedDict()

    async def check(self, call: Call) -> None:
        """Raises InvalidValue, with the parameter's name, where the call asks for what cannot be enforced."""
        grammar = call.params.get("grammar")
        if grammar is None:
            return
        key = hashlib.sha256(grammar.encode()).digest()
        found = self._known.get(key)
        if found is None:
            try:
                found = await self._ask(key, grammar)
            except TimeoutError:
                raise errors.DependencyUnavailable("The check of the output's form took too long; try again.") from None
        self._known.move_to_end(key)
        if not found["is_valid"]:
            raise _refusal(found, call.constrained_by)

    async def close(self) -> None:
        """End the processes."""
        self._idle.clear()
        await asyncio.gather(*map(self._discard, list(self._all)))

    async def _ask(self, key: bytes, grammar: str) -> dict[str, Any]:
        async with asyncio.timeout(_PATIENCE_S):
            await self._turns.acquire()
        try:
            if key in self._known:  # another request has asked meanwhile
                return self._known[key]
            found = await self._asked(await self._take(), grammar)
        finally:
            self._turns.release()
        self._known[key] = found
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return found

    async def _asked(self, process: Process, grammar: str) -> dict[str, Any]:
        """The process waits for the next question afterwards, if it still runs and has answered."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                found = await _answer(process, grammar)
        except BaseException:
            await self._discard(process)
            raise
        if process.returncode is None:
            self._idle.append(process)
        else:
            await self._discard(process)
        return found

    async def _take(self) -> Process:
        """One that waits, or a new one."""
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
            await self._discard(process)
        script = str(Path(__file__).with_name("grammar_process.py"))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", script, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
        )
        self._all.add(process)
        return process

    async def _discard(self, process: Process) -> None:
        self._all.discard(process)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def _answer(process: Process, grammar: str) -> dict[str, Any]:
    """What the process says; where it ended over the grammar, what that says. Raises DependencyUnavailable where
    somebody else ended it."""
    assert process.stdin is not None
    assert process.stdout is not None
    text = grammar.encode()
    with contextlib.suppress(ConnectionError):
        process.stdin.write(b"%d\n%b" % (len(text), text))
        await process.stdin.drain()
        line = await process.stdout.readline()
        if line.endswith(b"\n"):
            return dict(orjson.loads(line))
    if -await process.wait() in _OVER_THE_GRAMMAR:
        return _COSTLY
    raise errors.DependencyUnavailable()


def _refusal(found: dict[str, Any], param: str) -> APIError:
    if found.get("is_costly"):
        return errors.InvalidValue(f"{param} asks for a form that is too costly to enforce; simplify it.", param=param)
    if keywords := found.get("keywords"):
        used = ", ".join(keywords)
        return errors.InvalidValue(f"{param} has a JSON Schema whose {used} cannot be enforced here.", param=param)
    return errors.InvalidValue(f"{param} is not a valid description of a form, or not one known here.", param=param)
