"""Family D again: what happens to the rows themselves, and to the clock they are stamped with."""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from db import migrate
from local import servers, spawn
from tests.faults.lab import FAKETIME, Lab
from tests.faults.rows import row
from tests.faults.rows_servers import accepts_all

_ROOM_MIB = 48


@contextlib.contextmanager
def _small_disk(lab: Lab) -> Iterator[Path]:
    """The tables lie on a file system of their own, with little room, during the block. The log of Postgres lies
    elsewhere, as it should: a full one stops the server."""
    spec = lab.postgres.spec
    assert isinstance(spec, servers.Postgres)
    base, aside = spec.data / "base", spec.data / "base.aside"
    lab.postgres.stop()
    base.rename(aside)
    base.mkdir(mode=0o700)
    used = sum(file.stat().st_size for file in aside.rglob("*") if file.is_file()) >> 20
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={used + _ROOM_MIB}m,mode=700", "tmpfs", str(base)], check=True)
    try:
        subprocess.run(["cp", "-a", f"{aside}/.", str(base)], check=True)
        os.chown(base, spec.account.uid, spec.account.gid)
        lab.postgres.restart()
        yield base
    finally:
        (base / "filler").unlink(missing_ok=True)
        lab.postgres.stop()
        shutil.rmtree(aside)
        subprocess.run(["cp", "-a", str(base), str(aside)], check=True)
        subprocess.run(["umount", str(base)], check=True)
        base.rmdir()
        aside.rename(base)
        lab.postgres.restart()


@row("F54", "the disk of Postgres is full", "I1 I10 I22", within_s=10, needs="root")
def full_disk(lab: Lab) -> list[float]:
    client = lab.clients
    done = client.run(client.job())
    assert done is not None
    with lab.supervised(), _small_disk(lab) as base:
        lab.answers_again()
        with lab.traffic(rate=10):
            free = os.statvfs(base).f_bavail * os.statvfs(base).f_frsize
            filler = base / "filler"
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(free - 65_536, 4096))
            refused = None
            until = time.monotonic() + 15
            while refused is None and time.monotonic() < until:
                made = client.run(client.submit(os.urandom(700).hex(), "default", {}))
                refused = made if made.status == 503 else None
            assert refused is not None, "everything was taken"
            seen = client.run(client.wait(done, client.nonce()))
            assert seen == "succeeded", f"a poll saw {seen}"
            log = lab.postgres.log.read_text(errors="replace")
            assert "PANIC" not in log, "Postgres stopped"
            filler.unlink()
            return lab.answers_again()


_INJECT = """
CREATE SEQUENCE injected;
CREATE FUNCTION inject() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF random() < 0.05 THEN
        PERFORM nextval('injected');
        IF random() < 0.5 THEN RAISE EXCEPTION 'injected' USING ERRCODE = 'deadlock_detected'; END IF;
        RAISE EXCEPTION 'injected' USING ERRCODE = 'serialization_failure';
    END IF;
    RETURN NULL; END $$;
CREATE TRIGGER inject BEFORE INSERT OR UPDATE ON jobs FOR EACH STATEMENT EXECUTE FUNCTION inject();
"""


@row("F56", "one statement in twenty on jobs is a deadlock or a serialization failure", "I5 I9 I10", within_s=3)
def deadlocks(lab: Lab) -> list[float]:
    lab.query(_INJECT)
    since = time.monotonic()
    try:
        with lab.traffic():
            time.sleep(lab.times(6, 30))
        injected = lab.query("SELECT last_value FROM injected")[0][0]
        found = lab.answers_again()
    finally:
        lab.query("DROP TRIGGER inject ON jobs; DROP FUNCTION inject; DROP SEQUENCE injected")
    assert injected >= 10, f"{injected} failures injected"
    accepts_all(lab, since)
    refused = [record for record in lab.history.records if record.at > since and record.type == "fail" and (record.status or 0) >= 500]  # fmt: skip
    assert not refused, f"{len(refused)} failures came through, first {refused[0].kind} {refused[0].code}"
    return found


_MIGRATION = '''"""A column more."""
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "9999", "{head}", None, None

def upgrade() -> None:
    op.add_column("jobs", sa.Column("of_a_row", sa.Text()))
'''


@row("F59", "a migration under traffic, behind a transaction that goes on", "I9 I24", within_s=4)
def migration(lab: Lab) -> list[float]:
    scripts = lab.folder / "migrations"
    shutil.rmtree(scripts, ignore_errors=True)
    shutil.copytree(Path(migrate.__file__).parent / "migrations", scripts)
    head = lab.query("SELECT version_num FROM alembic_version")[0][0]
    (scripts / "versions" / "9999_of_a_row.py").write_text(_MIGRATION.format(head=head))
    failures: list[BaseException] = []

    def migrate_it() -> None:
        try:
            migrate.upgrade(lab.url, scripts)
        except BaseException as error:
            failures.append(error)

    since = time.monotonic()
    with lab.traffic():
        thread = threading.Thread(target=migrate_it)
        with lab.locked("jobs", "ACCESS SHARE MODE"):
            thread.start()
            time.sleep(4)
            assert thread.is_alive(), f"the migration did not wait: {failures}"
        released = time.monotonic()
        thread.join(20)
        took = time.monotonic() - released
        lab.answers_again()
    assert not failures, failures
    lab.query("ALTER TABLE jobs DROP COLUMN of_a_row")
    lab.query("UPDATE alembic_version SET version_num = %s", head)
    accepts_all(lab, since)
    return [took]


@row(
    "F71", "the clock of Postgres jumps a minute forth, and back", "I5 I6", within_s=15, needs="faketime", is_long=True
)
def jumping_clock(lab: Lab) -> list[float]:
    spec = lab.postgres.spec
    assert isinstance(spec, servers.Postgres)
    file = spec.data / "faketime"
    faked = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_NO_CACHE": "1",
             "DONT_FAKE_MONOTONIC": "1"}  # fmt: skip

    def jump(seconds: int) -> None:
        fresh = file.with_suffix(".new")
        fresh.write_text(f"{seconds:+d}\n")
        fresh.chmod(0o644)
        fresh.rename(file)

    def restart(environment: dict[str, str]) -> None:
        lab.postgres.stop()
        servers.clear_stale_lock(spec.data)
        lab.postgres.process = spawn.spawn(
            spec.argv, env=servers.server_env() | environment, cwd=Path("/"), log=lab.postgres.log, account=spec.account,
            death_signal=spec.stop_signal,
        )  # fmt: skip
        lab.until(lambda: spec.is_ready(lab.postgres.process.pid), "Postgres")

    jump(0)
    found = []
    try:
        with lab.supervised():
            restart(faked)
            lab.answers_again()
            with lab.traffic(mix={"job": 1, "long": 2}):
                for seconds in (60, 0, -60, 0):
                    before = lab.query("SELECT extract(epoch FROM clock_timestamp())::float8")[0][0] - time.time()
                    jump(seconds)
                    time.sleep(0.2)
                    after = lab.query("SELECT extract(epoch FROM clock_timestamp())::float8")[0][0] - time.time()
                    assert abs(after - before) > 50, f"the clock of Postgres moved by {after - before:.0f} s"
                    found += lab.answers_again()
                    time.sleep(1)
    finally:
        restart({})
        file.unlink()
    lab.answers_again()
    return found
