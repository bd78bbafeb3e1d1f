"""A project in a temporary folder whose gateway, workers and command line are a few lines each.

The stack starts processes by name (`python -m api.server`), so a folder with such modules is enough
to run it for real: real supervisor, real Postgres and Valkey, real signals.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from local import servers, supervisor

ROOT = Path(__file__).parents[2]

FILES = {
    "api/__init__.py": "",
    "api/cli.py": """
        import json, sys
        def main():
            assert sys.argv[1:] == ["keys", "create", "--name", "quickstart", "--replace", "--json"]
            print(json.dumps({"key": "sk-test"}))
    """,
    "api/server.py": """
        import json, os
        from http.server import BaseHTTPRequestHandler, HTTPServer
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                state = "ready" if os.path.exists(os.environ["SWITCHYARD_HOME"] + "/worker.ready") else "loading"
                body = json.dumps({"models": {"echo": state}}).encode()
                self.send_response(200 if state == "ready" else 503)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            def log_message(self, *_): pass
        HTTPServer(("127.0.0.1", int(os.environ["SWITCHYARD_PORT"])), Handler).serve_forever()
    """,
    "celery/__init__.py": "",
    "celery/__main__.py": """
        import os, pathlib, signal, sys
        if "worker" in sys.argv and os.environ.get("BROKEN_WORKER"):
            sys.exit("the model cannot be loaded")
        ready = pathlib.Path(os.environ["SWITCHYARD_HOME"], "worker.ready")
        if "worker" in sys.argv:
            ready.write_text("")
        signal.sigwait([signal.SIGTERM])
        ready.unlink(missing_ok=True)
    """,
    "db/__init__.py": "",
    "db/migrate.py": """
        import os, psycopg2
        connection = psycopg2.connect(os.environ["SWITCHYARD_DATABASE_URL"])
        connection.autocommit = True
        connection.cursor().execute("create table if not exists kept (at timestamptz default now())")
        connection.cursor().execute("insert into kept default values")
    """,
    "api/batcher.py": "import signal; signal.sigwait([signal.SIGTERM])",
    "tasks/__init__.py": "",
    "tasks/reconciler.py": "import signal; signal.sigwait([signal.SIGTERM])",
    "switchyard.yaml": """
        backends: {echo: {runtime: echo}}
        models: {echo: {path: echo, backends: [echo]}}
    """,
}


@dataclass
class Project:
    """The folder, and commands run in it as a user would."""

    folder: Path
    port: int
    flower_port: int
    env: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / ".switchyard"

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "local.stack", *arguments],
            cwd=self.folder,
            env=self.environment() | env,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("SWITCHYARD_")}
        return ours | {
            "PYTHONPATH": str(ROOT),
            "SWITCHYARD_PORT": str(self.port),
            "SWITCHYARD_FLOWER_PORT": str(self.flower_port),
            "COLUMNS": "200",
        }


@pytest.fixture
def project() -> Iterator[Project]:
    with made_project() as made:
        yield made


@pytest.fixture(scope="module")
def running() -> Iterator[Project]:
    """A project that is up, shared by tests that leave it up."""
    with made_project() as made:
        up = made.run("up")
        assert up.returncode == 0, up.stdout + up.stderr
        yield made


@contextlib.contextmanager
def made_project() -> Iterator[Project]:
    """A project that is stopped and removed afterwards. Not under `tmp_path`: Postgres must reach it."""
    folder = Path(tempfile.mkdtemp(prefix="switchyard-test-"))
    folder.chmod(0o755)
    for name, text in FILES.items():
        lines = text.splitlines()
        indent = next((len(line) - len(line.lstrip()) for line in lines if line.strip()), 0)
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(line[indent:] for line in lines) + "\n")
    made = Project(folder, servers.free_port(None), servers.free_port(None))
    try:
        yield made
    finally:
        made.run("down")
        shutil.rmtree(folder)


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait for a condition, at most a minute."""

    def wait(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "condition never held"
            time.sleep(0.01)

    return wait


def children(home: Path) -> dict[str, dict[str, object]]:
    """The supervisor's state file, by process name."""
    return {child["name"]: child for child in supervisor.read_state(home)["children"]}
