"""Ties vLLM's processes to the worker that started them.

vLLM runs an EngineCore process and, below it, one process per device. When the worker is killed with
SIGKILL they stay alive for good and keep the device's memory (measured with vLLM 0.32), so a restarted
worker cannot load its model. vLLM calls `register` in each of its processes, because it is a
`vllm.general_plugins` entry point of this distribution; the kernel then does the rest.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from importlib.metadata import entry_points

from backends import vllm_grammars

HOLDER_ENV = "SWITCHYARD_VLLM_HOLDER"
"""Process id of the worker. Unset (a vLLM that is not ours): the plugins do nothing."""

STOP_SIGNAL = signal.SIGUSR1
"""Asks an EngineCore to shut down, in SIGTERM's stead."""

_GROUP = "vllm.general_plugins"
_PREFIX = "switchyard_"
_REQUIRED = "switchyard_orphans"
_PR_SET_PDEATHSIG = 1


class PluginMissingError(RuntimeError):
    """vLLM would not load `register`; the message says what to do."""


def arm() -> None:
    """In the worker, before it creates an engine: the processes to come will be tied to this one."""
    ours = [point.name for point in entry_points(group=_GROUP) if point.name.startswith(_PREFIX)]
    if _REQUIRED not in ours:
        raise PluginMissingError(f"no entry point {_REQUIRED} in {_GROUP}; run `pip install --no-deps -e .`")
    if (allowed := os.environ.get("VLLM_PLUGINS")) is not None:
        os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*allowed.split(","), *ours]))
    os.environ[HOLDER_ENV] = str(os.getpid())


def register() -> None:
    """In an EngineCore or device process: die with the parent, and leave SIGTERM and SIGINT to the worker.

    The kernel sends the parent-death signal when the *thread* that started this process ends, so the
    worker must keep the thread that ran `Backend.start` for as long as it serves.
    """
    parent = multiprocessing.parent_process()
    if os.environ.get(HOLDER_ENV) in {None, str(os.getpid())} or parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have died between starting this process and the call above.
    if os.getppid() != parent.pid:
        os.kill(os.getpid(), signal.SIGKILL)
    _leave_termination_to_the_worker()
    atexit.register(_exit_at_once)
    vllm_grammars.register()


def _leave_termination_to_the_worker() -> None:
    """Ignore SIGTERM and SIGINT; what vLLM does on SIGTERM moves to STOP_SIGNAL.

    A stop often reaches the whole process group or control group. The worker drains; a device process
    that exited on its own SIGTERM would take the running sequences with it.
    """
    signal.signal(STOP_SIGNAL, signal.getsignal(signal.SIGTERM))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _exit_at_once() -> None:
    """End after the Python-level clean-up: on a CPU the interpreter's own takes longer than the 9 s vLLM waits."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
