"""Runtime name → backend class, imported on first use. Adding a runtime is one line here and one file."""

import importlib

from backends.base import Backend

_CLASSES = {
    "echo": "backends.echo_backend:EchoBackend",
    "gpt": "backends.gpt_backend:GPTBackend",
    "bert": "backends.bert_backend:BERTBackend",
    "vllm": "backends.vllm_backend:VLLMBackend",
}


def backend_class(runtime: str) -> type[Backend]:
    """The class of a runtime. Raises KeyError for an unknown name."""
    module, _, name = _CLASSES[runtime].partition(":")
    found: type[Backend] = getattr(importlib.import_module(module), name)
    return found
