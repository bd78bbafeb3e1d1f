"""Start a process that dies with the one that started it, and recognise it again later.

Each process leads its own session, so one signal to its group reaches whatever it forked. The kernel
delivers its death signal when the starting thread ends, however that happens: start from a thread
that lives as long as the process should.
"""

import contextlib
import ctypes
import os
import pwd
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Account:
    """Who a process runs as."""

    name: str
    uid: int
    gid: int

    @classmethod
    def of_uid(cls, uid: int) -> "Account":
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            return cls(str(uid), uid, uid)
        return cls(entry.pw_name, uid, entry.pw_gid)

    def is_us(self) -> bool:
        return self.uid == os.geteuid()


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: Path | None = None,
    account: Account | None = None,
    death_signal: int = signal.SIGKILL,
) -> subprocess.Popen[bytes]:
    """Start `argv` in a new session, its output appended to `log`, as `account` where that is not us.

    The file is opened for appending, so it may be truncated while the process writes.
    """
    other = None if account is None or account.is_us() else account
    with _output(log) as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=None if env is None else dict(env),
            start_new_session=True,
            preexec_fn=_die_with(os.getpid(), death_signal),  # noqa: PLW1509 - two system calls, no locks
            user=other.uid if other else None,
            group=other.gid if other else None,
            extra_groups=[] if other else None,
        )


def spawn_detached(argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start `argv` so that it outlives us, its output appended to `log`."""
    # What `make` tells its children would reach the compilers that vLLM starts.
    env = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    with _output(log) as output:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=env
        )


def adopt_orphans() -> None:
    """Become the parent of processes whose own parent died, so that they can be reaped.

    In a container the first process often reaps nobody.
    """
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_group(leader: int, signum: int = signal.SIGKILL) -> None:
    """Signal every process of the group. Nothing happens when the group is already empty."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signum)


def start_ticks(pid: int) -> int:
    """When `pid` started, in clock ticks since boot; 0 where there is no such process, or only a zombie.

    With the boot's id this names a process for good: unlike a wall-clock time it never shifts.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state == "Z" else int(fields[18])


def members(session: int) -> list[int]:
    """The processes that live in `session`, which is named by the pid of its first process."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == session and start_ticks(pid):
                found.append(pid)
    return found


def boot_id() -> str:
    """Names this boot of the machine: a pid recorded under another one means nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        # Some sandboxes have no such file.
        return str(int(psutil.boot_time()))


@contextlib.contextmanager
def _output(log: Path | None) -> Iterator[int | IO[bytes]]:
    if log is None:
        yield subprocess.DEVNULL
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as stream:
        yield stream


def _die_with(parent: int, signum: int) -> Callable[[], None]:
    def in_child() -> None:
        # Runs after the change of account, which clears the setting.
        _libc.prctl(PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return in_child
