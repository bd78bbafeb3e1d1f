"""What this installation serves: `switchyard.yaml` read into frozen records.

Gateway, router and workers all start from the same `Catalog`, so they cannot disagree about which
model lives on which queue. Reading it needs no model runtime: a model folder's own `config.json`
says its context length and what kind of head it has.
"""

import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Task = Literal["generate", "embed", "classify", "rerank"]


class CatalogError(Exception):
    """The configuration file cannot be used; the message names the entry and the remedy."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BackendEntry(_Entry):
    """One backend: a runtime, its Celery queue (of the same name) and what a worker of it may hold."""

    runtime: Literal["gpt", "bert", "vllm", "echo"]
    concurrency: int = Field(32, ge=1, le=4096, description="Jobs one worker process keeps in flight.")
    max_queued: int = Field(10_000, ge=1, description="Queued jobs above which new ones are refused.")
    max_queued_tokens: int = Field(
        4_000_000, ge=1, description="Prompt tokens of queued jobs above which new ones are refused."
    )
    workers: int = Field(1, ge=0, le=64, description="Worker processes `switchyard up` starts.")
    options: dict[str, Any] = Field(default_factory=dict, description="Passed to the runtime; see its file.")


class PriceEntry(_Entry):
    """What a million tokens cost, in any currency, to the third decimal: what budgets and usage count in."""

    input: float = Field(0.0, ge=0, le=100_000)
    output: float = Field(0.0, ge=0, le=100_000)

    @property
    def input_nano(self) -> int:
        """Of one prompt token, in 1e-9 of the currency."""
        return round(self.input * 1000)

    @property
    def output_nano(self) -> int:
        return round(self.output * 1000)


class ModelEntry(_Entry):
    """One model name and the backends that serve it, best first when nothing else decides."""

    path: str = Field(description="Folder (relative to the models folder, or absolute) or a hub name.")
    backends: list[str] = Field(min_length=1)
    tasks: list[Task] = Field(default_factory=list, description="Empty: taken from the model folder.")
    context_length: int | None = Field(None, ge=1, description="Lower limit than the model's own.")
    default_max_tokens: int = Field(256, ge=1)
    aliases: list[str] = Field(default_factory=list)
    fallback: list[str] = Field(default_factory=list, description="Models tried when no worker is up.")
    auto: bool = Field(True, description="May be chosen for model 'auto'.")
    mask: list[str] = Field(default_factory=list, description="Output filter: strings replaced by ***.")
    price: PriceEntry = Field(PriceEntry(), description="Of a million tokens; budgets and usage count in it.")


class LimitsEntry(_Entry):
    """Bounds of one request, checked before anything expensive."""

    body_bytes: int = Field(1_048_576, ge=1024)
    json_depth: int = Field(32, ge=4)
    json_nodes: int = Field(100_000, ge=100)
    inputs: int = Field(2048, ge=1, description="Texts in one embeddings, classify or rerank request.")
    n: int = Field(16, ge=1, description="Choices of one generation request.")
    file_bytes: int = Field(209_715_200, ge=1024, description="Size of an uploaded file.")
    batch_lines: int = Field(50_000, ge=1, description="Requests in one batch.")


class CacheEntry(_Entry):
    """The response cache."""

    enabled: bool = True
    ttl_s: int = Field(86_400, ge=1)
    max_bytes: int = Field(1_073_741_824, ge=0)


class _File(_Entry):
    backends: dict[str, BackendEntry]
    models: dict[str, ModelEntry]
    limits: LimitsEntry = LimitsEntry()
    cache: CacheEntry = CacheEntry()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as a backend and the gateway see it."""

    name: str
    path: str
    """Absolute folder, or a hub name where no such folder exists."""
    tasks: tuple[Task, ...]
    context_length: int
    revision: str
    """Names the weights: two folders with different weights have different revisions."""
    entry: ModelEntry
    labels: tuple[str, ...] = ()
    is_cross_encoder: bool = False
    has_chat_template: bool = False


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A backend and the models each of its workers holds."""

    name: str
    runtime: str
    entry: BackendEntry
    models: tuple[ModelSpec, ...]

    @property
    def options(self) -> Mapping[str, Any]:
        return MappingProxyType(self.entry.options)


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything declared, with aliases resolved."""

    models: Mapping[str, ModelSpec]
    backends: Mapping[str, BackendSpec]
    aliases: Mapping[str, str] = field(default_factory=dict)
    limits: LimitsEntry = LimitsEntry()
    cache: CacheEntry = CacheEntry()

    def model(self, name: str) -> ModelSpec | None:
        """The model called `name`, by its own name or an alias."""
        return self.models.get(self.aliases.get(name, name))

    def narrowed(self, names: Collection[str]) -> "Catalog":
        """This catalog as it is for somebody who may use only the models with these names or aliases: the
        others do not exist, also not as fallbacks."""
        kept = {self.aliases.get(name, name) for name in names}
        models = {
            name: replace(model, entry=model.entry.model_copy(
                update={"fallback": [other for other in model.entry.fallback if other in kept]}))
            for name, model in self.models.items() if name in kept
        }  # fmt: skip
        aliases = {alias: name for alias, name in self.aliases.items() if name in kept}
        return replace(self, models=models, aliases=aliases)

    def serving(self, model: ModelSpec) -> list[BackendSpec]:
        """The backends that serve `model`, in the order the file lists them."""
        return [self.backends[name] for name in model.entry.backends]


def load(config: Path, models_dir: Path) -> Catalog:
    """Read and check `config`. Raises CatalogError with one line that says what to change."""
    try:
        raw = yaml.safe_load(config.read_text())
    except OSError as error:
        raise CatalogError(f"{config}: cannot be read ({error.strerror}); set SWITCHYARD_CONFIG") from error
    except yaml.YAMLError as error:
        raise CatalogError(f"{config}: not valid YAML: {error}") from error
    try:
        file = _File.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CatalogError(f"{config}: {where}: {first['msg']}") from error
    models = {name: _model(name, entry, file, models_dir) for name, entry in file.models.items()}
    backends = {
        name: BackendSpec(name, entry.runtime, entry, tuple(m for m in models.values() if name in m.entry.backends))
        for name, entry in file.backends.items()
    }
    return Catalog(models, backends, _aliases(file), file.limits, file.cache)


def _aliases(file: _File) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for name, entry in file.models.items():
        for other in entry.fallback:
            if other not in file.models:
                raise CatalogError(f"models.{name}.fallback: no model {other!r}")
        for alias in entry.aliases:
            if alias in file.models or alias in aliases or alias == "auto":
                raise CatalogError(f"models.{name}.aliases: {alias!r} is already taken")
            aliases[alias] = name
    return aliases


def _model(name: str, entry: ModelEntry, file: _File, models_dir: Path) -> ModelSpec:
    for backend in entry.backends:
        if backend not in file.backends:
            raise CatalogError(f"models.{name}.backends: no backend {backend!r}")
    if all(file.backends[backend].runtime == "echo" for backend in entry.backends):
        tasks: tuple[Task, ...] = tuple(entry.tasks) or ("generate", "embed", "classify", "rerank")
        return ModelSpec(name, entry.path, tasks, entry.context_length or 131_072, "echo-1", entry)
    folder = model_folder(entry.path, models_dir)
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise CatalogError(f"models.{name}.path: no config.json in {folder}; run `make models`") from error
    architecture = (config.get("architectures") or [""])[0]
    own_length = config.get("max_position_embeddings") or 2048
    sentence = folder / "sentence_bert_config.json"
    if sentence.exists():
        own_length = min(own_length, json.loads(sentence.read_text()).get("max_seq_length") or own_length)
    labels = tuple(label for _, label in sorted((config.get("id2label") or {}).items(), key=lambda kv: int(kv[0])))
    is_classifier = architecture.endswith("ForSequenceClassification")
    is_cross_encoder = is_classifier and len(labels) == 1
    return ModelSpec(
        name=name,
        path=str(folder),
        tasks=tuple(entry.tasks) or _tasks(architecture, is_classifier, is_cross_encoder),
        context_length=min(own_length, entry.context_length or own_length),
        revision=_revision(folder),
        entry=entry,
        labels=labels if is_classifier and not is_cross_encoder else (),
        is_cross_encoder=is_cross_encoder,
        has_chat_template=_has_chat_template(folder),
    )


def _tasks(architecture: str, is_classifier: bool, is_cross_encoder: bool) -> tuple[Task, ...]:
    if is_cross_encoder:
        return ("rerank",)
    if is_classifier:
        return ("classify",)
    if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return ("generate",)
    return ("embed", "rerank")


def model_folder(path: str, models_dir: Path) -> Path:
    """The local folder of a model. A hub name is fetched (its small files only) when no folder has it."""
    local = models_dir / path
    if local.is_dir():
        return local.resolve()
    if Path(path).is_absolute() or path.startswith(".") or path.count("/") != 1:
        return local.absolute()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]))


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and bool(json.loads(config.read_text()).get("chat_template"))


@functools.lru_cache
def _revision(folder: Path) -> str:
    """Hash of the small files whole, and of 16 blocks spread over each weight file.

    Hashing every byte of a large model would cost minutes at each start; a changed weight file
    changes its blocks or its size.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.suffix not in {".json", ".jinja", ".txt", ".model", ".safetensors"}:
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            if file.suffix != ".safetensors":
                digest.update(stream.read())
                continue
            for block in range(16):
                stream.seek(size * block // 16)
                digest.update(stream.read(65_536))
    return digest.hexdigest()[:16]
