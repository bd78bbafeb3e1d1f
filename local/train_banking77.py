"""Trains the Banking77 head that `local/assets/banking77` ships; run it again only to change the head.

    python -m local.train_banking77 --data DIR [--encoder models/all-minilm-l6-v2] [--out local/assets/banking77]

DIR holds the official `train.csv` and `test.csv`. The encoder stays frozen: a logistic regression is fitted on
its standardised [CLS] states, the regularisation is chosen by cross-validation within the training file, and
the accuracy reported is that of the assembled model folder on the official test rows, which nothing else saw.
"""

import argparse
import csv
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from local import banking77

_SEED = 77
_STRENGTHS = (0.02, 0.05, 0.1, 0.2)
_NUM_FOLDS = 5
_MIN_STD = 0.01
"""Dimensions that hardly vary would otherwise get weights that amplify rounding."""
_MAX_TOKENS = 256
_BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Rows:
    texts: list[str]
    labels: list[str]


@dataclass(frozen=True, slots=True)
class Head:
    """A linear layer on the raw [CLS] state: standardisation is folded in."""

    weight: np.ndarray
    bias: np.ndarray


def main() -> None:
    args = _arguments()
    torch.manual_seed(_SEED)
    train, test = _read(args.data / "train.csv"), _read(args.data / "test.csv")
    names = sorted(set(train.labels), key=str.lower)
    print(f"{len(train.texts)} training rows, {len(test.texts)} test rows, {len(names)} labels", flush=True)
    states = _states(args.encoder, train.texts)
    targets = np.array([names.index(label) for label in train.labels])
    strength = _choose_strength(states, targets)
    head = _fit(states, targets, strength)
    accuracy = _publish(args, names, head, strength, test)
    print(f"test accuracy through the assembled folder: {accuracy:.4f}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the Banking77 head on a frozen encoder.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.csv and test.csv")
    parser.add_argument("--encoder", type=Path, default=Path("models/all-minilm-l6-v2"))
    parser.add_argument("--out", type=Path, default=banking77.ASSETS)
    return parser.parse_args()


def _read(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return Rows([row["text"] for row in rows], [row["category"] for row in rows])


def _states(folder: Path, texts: list[str]) -> np.ndarray:
    """float32 [texts, hidden]: the last layer's [CLS] states."""
    model = AutoModel.from_pretrained(folder, use_safetensors=True)
    return _forward(folder, model, texts, "encoding")


def _forward(folder: Path, model: PreTrainedModel, texts: list[str], what: str) -> np.ndarray:
    """The [CLS] states of an encoder or the logits of a classifier, in the order of `texts`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    rows: dict[int, np.ndarray] = {}
    for start in range(0, len(order), _BATCH_SIZE):
        picked = order[start : start + _BATCH_SIZE]
        batch = tokenizer(
            [texts[index] for index in picked],
            padding=True,
            truncation=True,
            max_length=_MAX_TOKENS,
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model(**batch)
        values = output.logits if "logits" in output else output.last_hidden_state[:, 0]
        rows.update(zip(picked, values.float().numpy(), strict=True))
        if start // _BATCH_SIZE % 50 == 0:
            print(f"{what}: {len(rows)} of {len(texts)}", flush=True)
    return np.stack([rows[index] for index in range(len(texts))])


def _choose_strength(states: np.ndarray, targets: np.ndarray) -> float:
    """The inverse regularisation with the best accuracy in a cross-validation of the training rows."""
    scores: dict[float, float] = {}
    for strength in _STRENGTHS:
        start = time.perf_counter()
        scores[strength] = _cross_validate(states, targets, strength)
        print(f"C={strength}: cross-validated {scores[strength]:.4f} ({time.perf_counter() - start:.0f} s)", flush=True)
    return max(scores, key=lambda strength: scores[strength])


def _cross_validate(states: np.ndarray, targets: np.ndarray, strength: float) -> float:
    folds = StratifiedKFold(_NUM_FOLDS, shuffle=True, random_state=_SEED)
    correct = 0
    for train, held in folds.split(states, targets):
        head = _fit(states[train], targets[train], strength)
        correct += int(((states[held] @ head.weight.T + head.bias).argmax(axis=1) == targets[held]).sum())
    return correct / len(targets)


def _fit(states: np.ndarray, targets: np.ndarray, strength: float) -> Head:
    mean = states.mean(axis=0)
    std = np.maximum(states.std(axis=0), _MIN_STD)
    regression = LogisticRegression(C=strength, max_iter=1000, random_state=_SEED)
    regression.fit((states - mean) / std, targets)
    weight = regression.coef_ / std
    bias = regression.intercept_ - weight @ mean
    # The fit leaves Fortran order, which safetensors would write as if it were C order.
    return Head(np.ascontiguousarray(weight, dtype=np.float32), bias.astype(np.float32))


def _publish(args: argparse.Namespace, names: list[str], head: Head, strength: float, test: Rows) -> float:
    """Write the head, assemble the real folder from it, and measure that on the test rows."""
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({"weight": head.weight, "bias": head.bias}, args.out / "head.safetensors")
    (args.out / "head.safetensors").chmod(0o644)
    record = {"labels": names, "inverse_regularisation": strength, "seed": _SEED}
    (args.out / "head.json").write_text(json.dumps(record, indent=2) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        banking77.assemble(args.encoder, args.out, Path(folder))
        model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
        logits = _forward(Path(folder), model, test.texts, "testing")
    correct = int((logits.argmax(axis=1) == np.array([names.index(label) for label in test.labels])).sum())
    record |= {"test_rows": len(test.texts), "test_correct": correct, "test_accuracy": correct / len(test.texts)}
    (args.out / "head.json").write_text(json.dumps(record, indent=2) + "\n")
    return correct / len(test.texts)


if __name__ == "__main__":
    main()
