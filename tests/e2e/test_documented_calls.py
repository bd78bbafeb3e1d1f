"""Every shell block of README.md and docs/curl.md, run as it stands against the small real models. Only the gateway's
address and the keys differ."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import running
from tests.stack import ROOT, Stack

pytestmark = [pytest.mark.e2e, pytest.mark.models, pytest.mark.timeout(300)]

ADDRESS = "http://127.0.0.1:8080"
PAGE = "docs/curl.md"
CONFIG = """
backends:
  gpt: {runtime: gpt, concurrency: 16, options: {dtype: float32, max_batch_size: 16}}
  bert: {runtime: bert, concurrency: 64, options: {dtype: float32}}
models:
  smollm2-135m-instruct: {path: smollm2-135m-instruct, backends: [gpt], context_length: 2048}
  all-minilm-l6-v2: {path: all-minilm-l6-v2, backends: [bert]}
  banking77: {path: banking77-minilm, backends: [bert]}
"""
CURL = """#!/bin/sh
# Any answer but a 2xx fails the block, also in the middle of a pipe; each call is counted.
echo call >> "$CALLS"
exec {curl} --fail-with-body --show-error --max-time 100 "$@"
"""


def blocks(page: str) -> list[str]:
    """The shell blocks of a page."""
    return re.findall(r"^```bash\n(.*?)^```\n", (ROOT / page).read_text(), re.M | re.S)


FIRST, *OTHERS = blocks(PAGE)
BLOCKS = [
    *(pytest.param(FIRST + script, id=f"{PAGE}-{at}") for at, script in enumerate(OTHERS, 2)),
    *(pytest.param(script, id=f"README.md-{at}") for at, script in enumerate(blocks("README.md"), 1)),
]


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    for made in running(server_urls, tmp_path_factory.mktemp("documented"), CONFIG, ["gpt", "bert"]):
        made.start_batcher()
        yield made


@pytest.mark.parametrize("script", BLOCKS)
def test_a_block_runs_as_it_stands(stack: Stack, tmp_path: Path, script: str) -> None:
    assert ADDRESS in script
    done, calls = run(stack, tmp_path, script)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert calls >= script.count("curl ") > 0


def run(stack: Stack, folder: Path, script: str) -> tuple[subprocess.CompletedProcess[str], int]:
    """The block in a folder of its own, and how often it called curl."""
    (folder / "bin").mkdir()
    curl = folder / "bin" / "curl"
    curl.write_text(CURL.replace("{curl}", str(shutil.which("curl"))))
    curl.chmod(0o700)
    calls = folder / "calls"
    environment = os.environ | {
        "PATH": f"{curl.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "KEY": stack.secret,
        "ADMIN": stack.create_key("operators", is_admin=True),
    }
    script = script.replace(ADDRESS, stack.url).replace("sk-sy-…", stack.secret)
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    return done, len(calls.read_text().splitlines()) if calls.exists() else 0
