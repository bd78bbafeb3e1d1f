"""Every Python block of README.md and docs/clients.md, run as it stands. Only the gateway's port differs."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import running
from tests.stack import ROOT, Stack

pytestmark = pytest.mark.e2e

ADDRESS = "http://127.0.0.1:8080"
CONFIG = """
backends: {echo: {runtime: echo, concurrency: 64}}
models:
  smollm2-135m-instruct: {path: echo, backends: [echo], context_length: 2048}
  all-minilm-l6-v2: {path: echo, backends: [echo]}
"""
"""The names that `make up` serves. Small models make these slow and their answers no different in form."""
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in ("README.md", "docs/clients.md")
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S), 1)
]


@pytest.fixture(scope="module")
def stack(server_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    for made in running(server_urls, tmp_path_factory.mktemp("documented"), CONFIG, ["echo"]):
        made.start_batcher()
        made.environment["SWITCHYARD_WEBHOOK_NETWORKS"] = "127.0.0.0/8"
        for name, start in (("reconciler", made.start_reconciler), ("gateway", made.start_gateway)):
            made.stop(name)
            start()
        yield made


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs_as_it_stands(stack: Stack, tmp_path: Path, block: str) -> None:
    assert ADDRESS in block
    script = tmp_path / "block.py"
    script.write_text(block.replace(ADDRESS, stack.url))
    done = subprocess.run(
        [sys.executable, "-W", "error", script], env=os.environ | {"KEY": stack.secret}, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    assert not re.search(r"failed(?!=0)", done.stdout)
