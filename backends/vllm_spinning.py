"""Makes vLLM's processes sleep while they wait for each other, on a CPU.

On a CPU the EngineCore and the process that computes hand each step over through shared memory, and
vLLM polls it in a `sched_yield` loop: measured with vLLM 0.32 on two cores, the EngineCore burns up to
3 ms of CPU per token beside 4 ms of computing, which the gateway and the databases need. Sleeping
brings that to 0.1 ms at the same tokens per second. On a GPU nothing changes: there the cores are free
and the latency of a wake-up counts.

vLLM calls `register` in each of its processes: it is a `vllm.general_plugins` entry point.
"""

import os

from backends.vllm_orphans import HOLDER_ENV

_RECHECK_MS = 10


def register() -> None:
    """Touch only a vLLM that this project started."""
    if HOLDER_ENV not in os.environ:
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _sleep_between_steps()


def _sleep_between_steps() -> None:
    from vllm.distributed.device_communicators import shm_broadcast

    # busy_loop_s: how long a reader spins before it waits for the writer's notification.
    shm_broadcast.SpinCondition.__init__.__defaults__ = (0.0,)
    # Notifications can get lost; the reader then notices the step at its next recheck, by default after 5 s.
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = _RECHECK_MS
