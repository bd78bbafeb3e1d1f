"""Puts the shipped Banking77 head on the sentence encoder: an ordinary BERT classifier folder.

Called while models are prepared. It needs neither the training data nor torch: the encoder's tensors are
renamed and the head's are added. `local/train_banking77.py` made the head; `assets/banking77/README.md` is
its card.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

ASSETS = Path(__file__).parent / "assets" / "banking77"

_POOLER_SCALE = 0.001
"""BERT's pooler is tanh(dense(x)). At a thousandth of the state tanh is linear (the largest error is below 1e-5 of the
value), so a linear head on the raw state fits into the architecture unchanged."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def build(encoder_dir: Path, out_dir: Path) -> None:
    """Write a `BertForSequenceClassification` folder of `encoder_dir`'s weights and the shipped head to `out_dir`.

    Existing files of the same names are replaced. The same inputs give the same bytes.
    """
    assemble(encoder_dir, ASSETS, out_dir)


def assemble(encoder_dir: Path, head_dir: Path, out_dir: Path) -> None:
    """`build` with a head from another folder: `head.safetensors` (weight, bias) and `head.json` (labels)."""
    out_dir.mkdir(parents=True, exist_ok=True)
    labels: list[str] = json.loads((head_dir / "head.json").read_text())["labels"]
    tensors = _encoder_tensors(encoder_dir) | _head_tensors(head_dir)
    save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    # The library writes mode 0600: a container's user could not read it.
    (out_dir / "model.safetensors").chmod(0o644)
    config = _config(json.loads((encoder_dir / "config.json").read_text()), labels)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in _TOKENIZER_FILES:
        shutil.copyfile(encoder_dir / name, out_dir / name)
    shutil.copyfile(head_dir / "README.md", out_dir / "README.md")


def _encoder_tensors(encoder_dir: Path) -> dict[str, np.ndarray]:
    tensors = load_file(encoder_dir / "model.safetensors")
    return {
        f"bert.{name}": tensor
        for name, tensor in tensors.items()
        if not name.startswith("pooler.") and not name.endswith("position_ids")
    }


def _head_tensors(head_dir: Path) -> dict[str, np.ndarray]:
    head = load_file(head_dir / "head.safetensors")
    hidden_size = head["weight"].shape[1]
    return {
        "bert.pooler.dense.weight": np.eye(hidden_size, dtype=np.float32) * np.float32(_POOLER_SCALE),
        "bert.pooler.dense.bias": np.zeros(hidden_size, dtype=np.float32),
        "classifier.weight": head["weight"] / np.float32(_POOLER_SCALE),
        "classifier.bias": head["bias"],
    }


def _config(encoder: dict[str, Any], labels: list[str]) -> dict[str, Any]:
    config = {key: value for key, value in encoder.items() if not key.startswith("_")}
    return config | {
        "architectures": ["BertForSequenceClassification"],
        "problem_type": "single_label_classification",
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }
