import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from local import spawn

from .conftest import ROOT

PARENT = """
import sys, time
from pathlib import Path
from local.spawn import spawn
child = spawn(["sleep", "1000"])
Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(1000)
"""


def test_a_child_dies_with_its_parent(tmp_path: Path, until: Callable[[Callable[[], object]], None]) -> None:
    note = tmp_path / "pid"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", PARENT, str(note)], env=env) as parent:
        until(lambda: note.exists() and note.read_text())
        child = int(note.read_text())
        assert spawn.start_ticks(child)
        parent.kill()
    until(lambda: not spawn.start_ticks(child))


def test_a_child_leads_its_session_and_its_group_can_be_killed(
    tmp_path: Path, until: Callable[[Callable[[], object]], None]
) -> None:
    child = spawn.spawn(["sh", "-c", "sleep 1000 & sleep 1000"], log=tmp_path / "log")
    until(lambda: len(spawn.members(child.pid)) == 3)
    spawn.kill_group(child.pid)
    assert child.wait() == -signal.SIGKILL
    until(lambda: not spawn.members(child.pid))
    spawn.kill_group(child.pid)


def test_output_is_appended_to_a_private_log(tmp_path: Path) -> None:
    for word in ("one", "two"):
        spawn.spawn(["sh", "-c", f"echo {word}; echo {word} >&2"], log=tmp_path / "logs" / "x.log").wait()
    log = tmp_path / "logs" / "x.log"
    assert log.read_text().split() == ["one", "one", "two", "two"]
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_zombie_and_a_stranger_have_no_start(until: Callable[[Callable[[], object]], None]) -> None:
    child = spawn.spawn(["true"])
    until(lambda: not spawn.start_ticks(child.pid))
    child.wait()
    assert spawn.start_ticks(2**22 + 1) == 0
    assert spawn.start_ticks(os.getpid()) > 0
