"""From a validated call to token ids: the chat template, the tokenizer, and whether it all fits.

The gateway does this before a job exists, so that a prompt too long for its model is refused at once
and a worker gets nothing but numbers. Needs the model folder's small files only, never its weights.
"""

import asyncio
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders

from api import errors
from api.schemas import ENDPOINTS
from api.schemas.tokenize import TokenizeRequest
from catalog import Catalog, CatalogError, ModelSpec
from tasks.call import Call
from tasks.identity import RESPONSES

_INLINE_CHARS = 2_000
"""Longer texts are tokenised in a thread. Tokenising costs 0.28 µs a character, so that this is 0.6 ms
of the event loop; the hop to a thread and back costs 0.1 ms, more than a typical chat of 300 characters."""
_SCALAR_CHARS = 8
"""Of a number or another value of JSON's that is no text."""
_NUM_THREADS = 4

_Chat = list[dict[str, Any]]
_Tools = list[dict[str, Any]]
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """The answer of POST /v1/tokenize, in vLLM's form."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Prompts:
    """The tokenizers of every model of the catalog. Loading them takes about 0.2 s a model."""

    def __init__(self, catalog: Catalog) -> None:
        self._tokenizers = {name: _load(model) for name, model in catalog.models.items()}
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenise")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def tokenise(self, call: Call, model: ModelSpec) -> Call:
        """`call` with token_ids (and type_ids for pairs) of `model`, with max_tokens decided, and as text
        what the answer repeats. Raises InvalidPrompt, ContextLengthExceeded, or InvalidValue for a token id
        outside the vocabulary."""
        prepare = partial(_tokenised, call, model, self._tokenizers[model.name])
        return await self._run(prepare, _num_chars(call.inputs, call.messages, call.format.get("tools")))

    async def count(self, request: TokenizeRequest, model: ModelSpec) -> TokenCount:
        """What a prompt or a chat comes to, however long it is."""
        count = partial(_counted, request, model, self._tokenizers[model.name])
        messages = [message.as_dict() for message in request.messages or ()]
        return await self._run(count, _num_chars([request.prompt or ""], messages))

    async def count_chat(self, messages: _Chat, tools: _Tools | None, model: ModelSpec) -> int:
        """What a chat comes to, as the model would be given it."""

        def count() -> int:
            return len(_joined(tokenizer.encode(_rendered(messages, tools, tokenizer), False)))

        tokenizer = self._tokenizers[model.name]
        return await self._run(count, _num_chars([], messages, tools))

    async def detokenize(self, model: ModelSpec, tokens: list[int]) -> str:
        """The text of `tokens`, special tokens spelled out. Raises InvalidValue outside the vocabulary."""
        tokenizer = self._tokenizers[model.name]
        _check_vocabulary(tokens, tokenizer.vocab_size, "tokens")
        return await self._run(partial(tokenizer.decode, tokens), len(tokens))

    async def _run(self, work: Callable[[], _Result], num_chars: int) -> _Result:
        if num_chars <= _INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class ModelTokenizer(Protocol):
    """What tokenising needs of a model. Thread-safe."""

    vocab_size: int

    def encode(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]: ...

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids and segment ids of each pair of texts."""

    @property
    def knows_tools(self) -> bool:
        """Whether the model's chat template has a place for tools."""

    def render(self, messages: _Chat, add_generation_prompt: bool = True, tools: _Tools | None = None) -> list[str]:
        """A chat as text, in pieces to be tokenised apart and without added special tokens. Raises
        InvalidPrompt where the model's template refuses the messages."""

    def decode(self, tokens: list[int]) -> str: ...

    def token_strs(self, tokens: list[int]) -> list[str]: ...

    def fewest_tokens(self, num_chars: int) -> int:
        """No text of so many characters has fewer tokens than this."""


class ByteTokenizer:
    """Echo's: token ids are the bytes of the text, and a chat is its lines `role: content`."""

    vocab_size = 256

    def encode(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
        halves = [self.encode([*pair]) for pair in pairs]
        return [one + two for one, two in halves], [[0] * len(one) + [1] * len(two) for one, two in halves]

    knows_tools = True

    def render(self, messages: _Chat, add_generation_prompt: bool = True, tools: _Tools | None = None) -> list[str]:
        lines = [f"tools: {_tojson(tools)}\n"] if tools else []
        for message in messages:
            calls = [_tojson(call["function"]) for call in message.get("tool_calls", ())]
            lines.append(f"{message['role']}: {message['content']}{''.join(calls)}\n")
        return ["".join(lines)]

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def token_strs(self, tokens: list[int]) -> list[str]:
        return [chr(token) for token in tokens]

    def fewest_tokens(self, num_chars: int) -> int:
        return num_chars


class FolderTokenizer:
    """A model folder's tokenizer.json and chat template, as transformers applies them, but for one thing:
    text in a chat message, or for an encoder, that spells a special token is not that token. A caller who
    passes on a stranger's text would otherwise let the stranger end the turn and begin a system message.
    A completion's prompt is the caller's own and keeps its special tokens, as in transformers and vLLM."""

    def __init__(self, folder: Path, *, is_encoder: bool) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if is_encoder:
            self._tokenizer.encode_special_tokens = True
        self._template = _chat_template(folder)
        self._specials = _Specials(self._tokenizer)
        self._longest_token = _longest_token(self._tokenizer)
        config = _read_json(folder / "config.json")
        text_config = config.get("text_config") or {}
        self.vocab_size = int(
            config.get("vocab_size") or text_config.get("vocab_size") or self._tokenizer.get_vocab_size()
        )

    def encode(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
        found = self._tokenizer.encode_batch_fast([*pairs])
        return [pair.ids for pair in found], [pair.type_ids for pair in found]

    @property
    def knows_tools(self) -> bool:
        return self._template is not None and self._template.knows_tools

    def render(self, messages: _Chat, add_generation_prompt: bool = True, tools: _Tools | None = None) -> list[str]:
        if self._template is None:
            raise errors.InvalidPrompt("This model has no chat template; use /v1/completions.")
        if not any(map(self._specials.are_in, _texts(messages, tools))):
            return [self._template.render(messages, add_generation_prompt, tools)]
        mark = f"\ufdd0{secrets.token_hex(8)}\ufdd0"
        cut = partial(self._specials.cut, mark=mark)
        apart = [{**_mapped(message, cut), "role": message["role"]} for message in messages]
        return self._template.render(apart, add_generation_prompt, _mapped(tools, cut)).split(mark)

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def token_strs(self, tokens: list[int]) -> list[str]:
        return [self._tokenizer.id_to_token(token) or "" for token in tokens]

    def fewest_tokens(self, num_chars: int) -> int:
        return num_chars // self._longest_token if self._longest_token else 0


def _texts(messages: _Chat, tools: _Tools | None) -> Iterator[str]:
    """Every text of the caller's in a chat."""
    for message in messages:
        yield message["content"]
        if "tool_calls" in message or "tool_call_id" in message:
            yield from _strings({name: value for name, value in message.items() if name not in ("role", "content")})
    yield from _strings(tools)


def _strings(value: Any) -> Iterator[str]:
    """Every text in a value of JSON's types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON's types with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list) else value


class _Specials:
    """The special tokens of a tokenizer, as they may be spelled in a caller's text.

    Text is cut after the first character of each, and the pieces are tokenised apart: neither piece can
    then hold the special token, and everything else is tokenised as it would be anyway.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        spellings = [token.content for token in added if token.special and len(token.content) > 1]
        self._beginnings = {spelling[0] for spelling in spellings}
        # A lookahead consumes nothing, so that overlapping spellings are all found.
        anyone = "|".join(map(re.escape, spellings)) or r"(?!)"
        self._spelled = re.compile(rf"(?=(?:{anyone}))(.)", re.DOTALL)

    def are_in(self, text: str) -> bool:
        """Most text lacks the characters they begin with, which is far cheaper to see."""
        return any(beginning in text for beginning in self._beginnings) and self._spelled.search(text) is not None

    def cut(self, text: str, mark: str) -> str:
        return self._spelled.sub(lambda match: match[1] + mark, text)


class _ChatTemplate:
    """A Jinja chat template with the environment that transformers gives it."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
        self._source = source
        self._template = environment.from_string(source)
        self._variables = variables
        self.knows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))

    def render(self, messages: _Chat, add_generation_prompt: bool, tools: _Tools | None) -> str:
        """Raises InvalidPrompt where the template refuses the messages."""
        try:
            return self._template.render(
                self._variables,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, ArithmeticError) as error:
            # A reason that stands in the template itself cannot hold text of the request.
            reason = str(error) if isinstance(error, jinja2.TemplateError) else ""
            known = f": {reason}" if reason and reason in self._source else "."
            raise errors.InvalidPrompt(f"The model's chat template refuses these messages{known}") from None


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model wrote, for training; here it is what stands inside."""

    tags = {"generation"}  # noqa: RUF012  (declared so by jinja2)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _load(model: ModelSpec) -> ModelTokenizer:
    if model.revision == "echo-1":
        return ByteTokenizer()
    if not (Path(model.path) / "tokenizer.json").exists():
        raise CatalogError(f"models.{model.name}.path: no tokenizer.json in {model.path}")
    return FolderTokenizer(Path(model.path), is_encoder="generate" not in model.tasks)


def _tokenised(call: Call, model: ModelSpec, tokenizer: ModelTokenizer) -> Call:
    if call.task == "generate":
        return _tokenised_generation(call, model, tokenizer)
    type_ids = None
    if pairs := _pairs(call, model):
        token_ids, type_ids = tokenizer.encode_pairs(pairs)
    else:
        token_ids = _encoded_inputs(call, model, tokenizer)
    for index, ids in enumerate(token_ids):
        if len(ids) > model.context_length:
            raise _too_long(call, model, index, len(ids))
    return replace(call, token_ids=token_ids, type_ids=type_ids)


def _pairs(call: Call, model: ModelSpec) -> list[tuple[str, str]]:
    """The texts that the model reads two at a time."""
    texts = [text for text in call.inputs if isinstance(text, str)]
    if call.format.get("pairs"):
        return list(zip(texts[::2], texts[1::2], strict=True))
    if call.task == "rerank" and model.is_cross_encoder:
        documents = texts[call.num_queries :]
        queries = texts[: call.num_queries] if call.num_queries > 1 else texts[:1] * len(documents)
        return list(zip(queries, documents, strict=True))
    return []


def _tokenised_generation(call: Call, model: ModelSpec, tokenizer: ModelTokenizer) -> Call:
    if call.messages is not None:
        pieces = _rendered(call.messages, call.format.get("tools"), tokenizer, _chat_field(call))
        _check_fewest(call, model, 0, tokenizer.fewest_tokens(_num_chars(pieces)))
        token_ids = [_joined(tokenizer.encode(pieces, False))]
    else:
        token_ids = _encoded_inputs(call, model, tokenizer)
    _check_vocabulary(call.params.get("stop_token_ids", ()), tokenizer.vocab_size, "stop_token_ids")
    _check_vocabulary(call.params.get("logit_bias", ()), tokenizer.vocab_size, "logit_bias")
    for index, ids in enumerate(token_ids):
        if not ids:
            raise errors.InvalidPrompt("The prompt has no tokens.", param=_where(call, index))
        _check_length(call, model, index, len(ids))
    longest = max(map(len, token_ids))
    max_tokens = call.max_tokens or min(model.entry.default_max_tokens, model.context_length - longest)
    if call.params.get("min_tokens", 0) > max_tokens:
        raise errors.NumberOutOfRange(
            f"min_tokens must not be greater than max_tokens, which is {max_tokens} here.", param="min_tokens"
        )
    inputs = call.inputs
    if call.format.get("echo"):
        inputs = [tokenizer.decode(given) if isinstance(given, list) else given for given in inputs]
    return replace(call, inputs=inputs, token_ids=token_ids, max_tokens=max_tokens)


def _rendered(messages: _Chat, tools: _Tools | None, tokenizer: ModelTokenizer, field: str = "messages",
              *, add_generation_prompt: bool = True) -> list[str]:  # fmt: skip
    """`field` of the request has the messages."""
    if not tokenizer.knows_tools:
        if tools:
            raise errors.UnsupportedParameter("The model's chat template has no place for tools.", param="tools")
        for index, message in enumerate(messages):
            if message["role"] == "tool" or "tool_calls" in message:
                # Items of an input are merged into messages: their numbers are not the caller's.
                where = f"{field}.{index}" if field == "messages" else field
                raise errors.UnsupportedParameter("The model's chat template has no place for tools.", param=where)
    try:
        return tokenizer.render(messages, add_generation_prompt, tools)
    except errors.InvalidPrompt as error:
        raise errors.InvalidPrompt(error.message, param=field) from None


def _chat_field(call: Call) -> str:
    return "input" if call.endpoint == RESPONSES else "messages"


def _encoded_inputs(call: Call, model: ModelSpec, tokenizer: ModelTokenizer) -> list[list[int]]:
    """All of a call's inputs are texts, or all are token ids."""
    texts = [text for text in call.inputs if isinstance(text, str)]
    for index, text in enumerate(texts):
        _check_fewest(call, model, index, tokenizer.fewest_tokens(len(text)))
    if texts:
        return tokenizer.encode(texts)
    given = [ids for ids in call.inputs if isinstance(ids, list)]
    for index, ids in enumerate(given):
        _check_vocabulary(ids, tokenizer.vocab_size, _where(call, index))
    return given


def _check_fewest(call: Call, model: ModelSpec, index: int, fewest: int) -> None:
    """Refuses before tokenising: a long run of one letter costs a tokenizer 0.5 s a megabyte."""
    if fewest > model.context_length:
        raise _too_long(call, model, index, fewest, "at least ")


def _check_length(call: Call, model: ModelSpec, index: int, num_tokens: int) -> None:
    """Where the request names no max_tokens, room for one token is enough."""
    if num_tokens + (call.max_tokens or 1) > model.context_length:
        raise _too_long(call, model, index, num_tokens)


def _too_long(
    call: Call, model: ModelSpec, index: int, num_tokens: int, hedge: str = ""
) -> errors.ContextLengthExceeded:
    where = _where(call, index, is_pair=bool(_pairs(call, model)))
    wanted = f" and {call.max_tokens} more were requested (max_tokens)" if call.max_tokens else ""
    return errors.ContextLengthExceeded(
        f"The model's context is {model.context_length} tokens, but {where} comes to {hedge}{num_tokens}{wanted}.",
        param=where,
    )


def _where(call: Call, index: int, *, is_pair: bool = False) -> str:
    """The field of the request that text `index` of the call came from, or the second text of pair `index`."""
    if call.messages is not None:
        return _chat_field(call)
    first, *second = ENDPOINTS[call.endpoint].text_fields
    if second:
        queries = 0 if is_pair else call.num_queries
        if index < queries:
            return first if queries == 1 else f"{first}.{index}"
        return f"{second[0]}.{index - queries}"
    return first if len(call.inputs) == 1 else f"{first}.{index}"


def _check_vocabulary(tokens: Iterable[int], vocab_size: int, param: str) -> None:
    if max(tokens, default=0) >= vocab_size:
        raise errors.InvalidValue(f"{param} has a token id outside the model's {vocab_size} tokens.", param=param)


def _counted(request: TokenizeRequest, model: ModelSpec, tokenizer: ModelTokenizer) -> TokenCount:
    if request.messages is not None:
        messages = [message.as_dict() for message in request.messages]
        wants_prompt = request.add_generation_prompt is not False
        pieces = _rendered(messages, None, tokenizer, add_generation_prompt=wants_prompt)
        tokens = _joined(tokenizer.encode(pieces, False))
    else:
        tokens = tokenizer.encode([request.prompt or ""], request.add_special_tokens is not False)[0]
    return TokenCount(
        count=len(tokens),
        max_model_len=model.context_length,
        tokens=tokens,
        token_strs=tokenizer.token_strs(tokens) if request.return_token_strs else None,
    )


def _joined(pieces: list[list[int]]) -> list[int]:
    return pieces[0] if len(pieces) == 1 else [token for ids in pieces for token in ids]


def _num_chars(inputs: Iterable[str | list[int]], messages: _Chat | None = None, tools: _Tools | None = None) -> int:
    """About: what else stands in a prompt, a template adds."""
    return sum(map(len, inputs)) + _length(messages) + _length(tools)


def _length(value: Any) -> int:
    """How many characters a value of JSON's types has, about."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _length(inner) for key, inner in value.items())
    if isinstance(value, list):
        return sum(map(_length, value))
    return _SCALAR_CHARS


def _chat_template(folder: Path) -> _ChatTemplate | None:
    config = _read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source = file.read_text() if file.exists() else config.get("chat_template")
    if isinstance(source, list):
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    if not source:
        return None
    named = _read_json(folder / "special_tokens_map.json") | config
    variables = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in named.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }
    return _ChatTemplate(source, variables)


def _longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token, where every byte of a text is in some token; 0 where some may be
    dropped or folded together (normalizers, unknown words)."""
    is_byte_level = tokenizer.normalizer is None and isinstance(tokenizer.decoder, decoders.ByteLevel)
    return max(map(len, tokenizer.get_vocab())) if is_byte_level else 0


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
