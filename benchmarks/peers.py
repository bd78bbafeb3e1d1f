"""Other gateways, installed beside the project and run as their manuals say: LiteLLM's proxy, Portkey's. And a client.

They live in a folder of their own (a virtual environment, a node_modules) and never touch the project's.
Both listen on loopback only and speak to the no-op upstream. A peer that cannot be had raises PeerError:
the benchmarks print that in its row.
"""

import contextlib
import http.client
import json
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from benchmarks import stack
from local import servers, spawn

DEFAULT_FOLDER = Path.home() / ".cache" / "switchyard-peers"
INSTALL_S = 900.0
READY_S = 120.0

_LITELLM = "litellm[proxy]<=1.109.1,>=1.100"
_AGENTS = "openai-agents==0.24.0"
_PORTKEY = "@portkey-ai/gateway@1.15.2"
_KEY = "sk-bench"

# Portkey's server listens on every address; a benchmark must not offer the network a proxy.
_LOOPBACK_ONLY = """\
const net = require('net');
const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (port, ...rest) {
  return listen.call(this, port, '127.0.0.1', rest.find((one) => typeof one === 'function'));
};
"""


class PeerError(Exception):
    """The peer cannot be installed or started; the message says why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A running gateway of somebody else's."""

    name: str
    """With its version."""
    port: int
    process: "subprocess.Popen[bytes]"
    headers: Mapping[str, str] = field(default_factory=dict)


Starter = Callable[[Path, int], "contextlib.AbstractContextManager[Peer]"]


def install_litellm(folder: Path) -> Path:
    """LiteLLM in a virtual environment of its own, installed if it is not there yet; the environment's folder."""
    return _installed(folder.absolute() / "litellm", "bin/litellm", _LITELLM)


def install_agents(folder: Path) -> Path:
    """OpenAI's Agents SDK, a client of the Responses API, likewise."""
    return _installed(folder.absolute() / "agents", "lib/*/site-packages/agents", _AGENTS)


def _installed(home: Path, found_by: str, requirement: str) -> Path:
    if not any(home.glob(found_by)):
        _run([sys.executable, "-m", "venv", str(home)])
        _run([str(home / "bin" / "pip"), "install", "--quiet", requirement])
    return home


@contextlib.contextmanager
def litellm(folder: Path, upstream_port: int) -> Iterator[Peer]:
    """LiteLLM's proxy: one process, a key to check, no database, nothing logged."""
    home = install_litellm(folder)
    version = _installed_version(home / "bin" / "python", "litellm")
    upstream = {"model": "openai/echo", "api_base": f"http://127.0.0.1:{upstream_port}/v1", "api_key": "none"}
    config = {
        "model_list": [{"model_name": "echo", "litellm_params": upstream}],
        "litellm_settings": {"num_retries": 0, "telemetry": False},
        "general_settings": {"master_key": _KEY},
    }
    file = folder / "litellm.yaml"
    file.write_text(yaml.safe_dump(config))
    port = servers.free_port(None)
    argv = [str(home / "bin" / "litellm"), "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION"}
    with _running([*argv, "--num_workers", "1"], port, "/health/liveliness", folder / "litellm.log", env) as process:
        yield Peer(f"litellm {version}", port, process, {"authorization": f"Bearer {_KEY}"})


@contextlib.contextmanager
def portkey(folder: Path, upstream_port: int) -> Iterator[Peer]:
    """Portkey's gateway: one node process, told by headers where to send."""
    home = folder.absolute() / "portkey"
    package = home / "node_modules" / "@portkey-ai" / "gateway"
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise PeerError("node and npm are not installed")
    if not package.exists():
        home.mkdir(parents=True, exist_ok=True)
        _run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(home), _PORTKEY])
    version = json.loads((package / "package.json").read_text())["version"]
    preload = home / "loopback.cjs"
    preload.write_text(_LOOPBACK_ONLY)
    port = servers.free_port(None)
    server = package / "build" / "start-server.js"
    argv = ["node", "--require", str(preload), str(server), f"--port={port}", "--headless"]
    headers = {
        "authorization": f"Bearer {_KEY}",
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"http://127.0.0.1:{upstream_port}/v1",
    }
    with _running(argv, port, "/", folder / "portkey.log", {"NODE_ENV": "production"}) as process:
        yield Peer(f"portkey {version}", port, process, headers)


STARTERS: Mapping[str, Starter] = {"litellm": litellm, "portkey": portkey}


@contextlib.contextmanager
def process(argv: list[str], url: str, log: Path, env: Mapping[str, str] | None = None,
            ready_s: float = READY_S) -> Iterator["subprocess.Popen[bytes]"]:  # fmt: skip
    """Any server process, from the moment that `url` is answered. Raises PeerError."""
    log.unlink(missing_ok=True)
    started = spawn.spawn(argv, env=stack.environment(env or {}), cwd=stack.ROOT, log=log)
    try:
        _wait(started, url, log, ready_s)
        yield started
    finally:
        spawn.kill_group(started.pid)
        started.wait()


def _running(argv: list[str], port: int, path: str, log: Path,
             env: Mapping[str, str]) -> "contextlib.AbstractContextManager[subprocess.Popen[bytes]]":  # fmt: skip
    return process(argv, f"http://127.0.0.1:{port}{path}", log, env)


def _wait(started: "subprocess.Popen[bytes]", url: str, log: Path, ready_s: float) -> None:
    deadline = time.monotonic() + ready_s
    while not _answers(url):
        if started.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text(errors="replace").splitlines()[-8:] if log.exists() else []
            state = "ended at once" if started.poll() is not None else f"is not ready after {ready_s:g} s"
            raise PeerError(f"{Path(started.args[0]).name} {state}: {' | '.join(tail)}")  # type: ignore[index, arg-type]
        time.sleep(0.1)


def _answers(url: str) -> bool:
    """Whether anything but a server error comes back."""
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=5.0)
    try:
        connection.request("GET", parts.path or "/")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"{Path(argv[0]).name}: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise PeerError(f"{Path(argv[0]).name} failed: {lines[-1][:200]}")


def _installed_version(python: Path, package: str) -> str:
    argv = [str(python), "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
