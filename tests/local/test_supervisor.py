import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from local import spawn, supervisor
from local.supervisor import Spec

Until = Callable[[Callable[[], object]], None]


class Running:
    """A supervisor in a process of its own, as `up` starts it."""

    def __init__(self, home: Path, specs: list[Spec], until: Until) -> None:
        self.home, self.until = home, until
        supervisor.write_plan(home, specs)
        self.process = spawn.spawn_detached(
            [sys.executable, "-m", "local.supervisor", str(home)], supervisor.log_file(home, "supervisor")
        )
        until(lambda: supervisor.read_state(home).get("pid") == self.process.pid)

    def child(self, name: str) -> dict[str, Any]:
        return next(child for child in supervisor.read_state(self.home)["children"] if child["name"] == name)

    def wait_for(self, name: str, state: str) -> dict[str, Any]:
        self.until(lambda: self.child(name)["state"] == state)
        return self.child(name)

    def log(self) -> str:
        return supervisor.log_file(self.home, "supervisor").read_text()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture
def start(tmp_path: Path, until: Until) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def begin(*specs: Spec) -> Running:
        started.append(Running(tmp_path, list(specs), until))
        return started[-1]

    yield begin
    for running in started:
        running.stop()


def shell(name: str, script: str, **options: Any) -> Spec:
    return Spec(name, ["sh", "-c", script], **options)


def test_a_dying_process_is_restarted_later_each_time(start: Callable[..., Running], until: Until) -> None:
    running = start(shell("brief", "exit 3"), shell("steady", "exec sleep 1000"))
    steady = running.wait_for("steady", "running")
    until(lambda: running.child("brief")["restarts"] >= 2)
    assert "brief ended (exit 3); again in 1 s" in running.log()
    assert "brief ended (exit 3); again in 2 s" in running.log()
    assert running.child("steady")["pid"] == steady["pid"]


def test_back_off_grows_to_a_minute() -> None:
    assert supervisor.BACKOFF_S[0] == 1
    assert supervisor.BACKOFF_S[-1] == 60
    assert list(supervisor.BACKOFF_S) == sorted(supervisor.BACKOFF_S)


def test_a_program_that_cannot_start_is_tried_again(start: Callable[..., Running]) -> None:
    running = start(Spec("missing", ["/nonexistent"]), shell("steady", "exec sleep 1000"))
    assert "No such file" in running.wait_for("missing", "backoff")["last_exit"]


def test_a_dead_worker_takes_its_helpers_with_it(start: Callable[..., Running], until: Until, tmp_path: Path) -> None:
    running = start(shell("worker", f"sleep 1000 & echo $! > {tmp_path}/helper; exec sleep 1000"))
    worker = running.wait_for("worker", "running")["pid"]
    until(lambda: (tmp_path / "helper").exists() and (tmp_path / "helper").read_text())
    helper = int((tmp_path / "helper").read_text())
    os.kill(worker, signal.SIGKILL)
    until(lambda: not spawn.start_ticks(helper))
    until(lambda: running.child("worker")["restarts"] == 1)
    assert running.child("worker")["last_exit"] == "SIGKILL"


def test_inherited_dead_are_collected(start: Callable[..., Running], until: Until, tmp_path: Path) -> None:
    """A helper whose parent died is the supervisor's to reap: nobody else does in most containers."""
    running = start(shell("parent", f"(sleep 0.2; exit 1) & echo $! > {tmp_path}/orphan; exit 0"))
    until(lambda: (tmp_path / "orphan").exists() and (tmp_path / "orphan").read_text())
    orphan = int((tmp_path / "orphan").read_text())
    until(lambda: not Path(f"/proc/{orphan}").exists())
    assert running.process.poll() is None


def test_what_follows_waits_for_a_first_step(start: Callable[..., Running], tmp_path: Path) -> None:
    first = shell("migrate", f"echo migrate >> {tmp_path}/order; test $(wc -l < {tmp_path}/order) -gt 1", once=True)
    running = start(first, shell("app", f"echo app >> {tmp_path}/order; exec sleep 1000"))
    running.wait_for("app", "running")
    assert running.child("migrate")["state"] == "done"
    running.until(lambda: (tmp_path / "order").read_text().split() == ["migrate", "migrate", "app"])


def test_servers_stop_after_what_uses_them(start: Callable[..., Running], tmp_path: Path) -> None:
    def script(name: str) -> str:
        said = f"trap 'echo {name} >> {tmp_path}/order; exit 0' TERM; echo > {tmp_path}/{name}"
        return f"{said}; while :; do sleep 0.05; done"

    names = ("postgres", "valkey", "app")
    running = start(*(shell(name, script(name), is_server=name != "app") for name in names))
    running.until(lambda: all((tmp_path / name).exists() for name in names))
    running.stop()
    assert (tmp_path / "order").read_text().split() == ["app", "valkey", "postgres"]
    assert {child["state"] for child in supervisor.read_state(tmp_path)["children"]} == {"stopped"}


def test_a_process_that_will_not_stop_is_killed(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start(shell("stubborn", f"trap '' TERM; echo > {tmp_path}/up; while :; do sleep 0.05; done", stop_s=0.2))
    running.until((tmp_path / "up").exists)
    pid = running.child("stubborn")["pid"]
    running.stop()
    assert not spawn.start_ticks(pid)
    assert "stubborn did not stop within 0.2 s: killed" in running.log()


def test_a_stop_while_something_waits_to_restart(start: Callable[..., Running]) -> None:
    running = start(shell("brief", "exit 1"))
    running.wait_for("brief", "backoff")
    running.stop()
    assert running.process.returncode == 0


def test_a_killed_supervisor_leaves_nothing_behind(start: Callable[..., Running], until: Until, tmp_path: Path) -> None:
    """The kernel ends its children; their helpers are ended by the next start."""
    script = f"sleep 1000 & echo $! > {tmp_path}/helper; wait"
    first = start(shell("worker", script))
    worker = first.wait_for("worker", "running")["pid"]
    until(lambda: (tmp_path / "helper").exists() and (tmp_path / "helper").read_text())
    helper = int((tmp_path / "helper").read_text())
    first.process.kill()
    first.process.wait()
    until(lambda: not spawn.start_ticks(worker))
    assert spawn.start_ticks(helper)
    assert not supervisor.is_running(tmp_path)
    second = start(shell("worker", "exec sleep 1000"))
    second.wait_for("worker", "running")
    assert not spawn.start_ticks(helper)
    assert "ended 1 processes of a supervisor that was killed" in second.log()


def test_leftovers_are_only_what_was_recorded(tmp_path: Path) -> None:
    """Another boot, or another process under the same number: not ours to end."""
    stranger = spawn.spawn(["sleep", "1000"])
    try:
        child = {"name": "x", "pid": stranger.pid, "ticks": spawn.start_ticks(stranger.pid) - 1, "stop_signal": 9}
        for state in ({"boot": "another", "children": [child]}, {"boot": spawn.boot_id(), "children": [child]}, {}):
            (tmp_path / supervisor.STATE_FILE).write_text(json.dumps(state))
            assert supervisor.clear_leftovers(tmp_path) == 0
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_there_is_one_supervisor_of_a_home(start: Callable[..., Running], tmp_path: Path) -> None:
    start(shell("app", "exec sleep 1000"))
    assert supervisor.is_running(tmp_path)
    second = subprocess.run([sys.executable, "-m", "local.supervisor", str(tmp_path)], capture_output=True, check=False)
    assert second.returncode == 1
    assert b"already runs" in second.stderr


def test_state_and_plan_are_private(start: Callable[..., Running], tmp_path: Path) -> None:
    start(shell("app", "exec sleep 1000"))
    for name in (supervisor.STATE_FILE, supervisor.PLAN_FILE):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_a_long_log_is_moved_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    with contextlib.closing(os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w")) as writer:
        writer.write("a" * 100)
        writer.flush()
        supervisor.rotate(log, limit=50)
        writer.write("b")
        writer.flush()
    assert log.read_text() == "b"
    assert log.with_name("x.log.1").read_text() == "a" * 100
    supervisor.rotate(log, limit=50)
    assert log.read_text() == "b"


def test_a_dead_process_takes_its_live_gauges_with_it(tmp_path: Path) -> None:
    for name in ("gauge_livesum_7.db", "gauge_livesum_8.db", "counter_7.db"):
        (tmp_path / name).touch()
    supervisor.forget_metrics(shell("x", "", env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}), 7)
    assert {file.name for file in tmp_path.iterdir()} == {"gauge_livesum_8.db", "counter_7.db"}
