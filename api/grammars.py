"""What an answer must look like, as one grammar: JSON Schemas, regular expressions, choices and tool calls all become
llguidance's Lark form, which every backend with structured outputs reads.

The sizes are looked at here, before anything is compiled; `api.grammar_checks` compiles.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from pydantic_core import PydanticCustomError

from api import decoding, errors
from api.closed_schemas import closed
from catalog import LimitsEntry
from tasks.tool_calls import BEGIN, END

MAX_CHARS = 65_536
MAX_NODES = 8_192
MAX_DEPTH = 24
MAX_CHOICES = 1_024

_ONE_LINE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""JSON on one line: a small model that may write any white space writes nothing else until max_tokens."""
_LIMITS = LimitsEntry(json_depth=MAX_DEPTH, json_nodes=MAX_NODES)
_SLASH = re.compile(r"(\\.)|/", re.DOTALL)


def check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """For pydantic: a JSON Schema that is small enough to be compiled."""
    text = orjson.dumps(schema)
    if len(text) > MAX_CHARS:
        raise PydanticCustomError("validation_error", f"must be smaller than {MAX_CHARS} bytes")
    try:
        decoding.decode(text, _LIMITS)
    except errors.JSONTooDeep:
        raise PydanticCustomError("validation_error", f"must not be nested deeper than {MAX_DEPTH} levels") from None
    except errors.APIError:
        raise PydanticCustomError("validation_error", f"must have at most {MAX_NODES} values") from None
    if "x-guidance" in schema:
        raise PydanticCustomError("unsupported_parameter", "must not have x-guidance")
    return schema


def of_schema(schema: Mapping[str, Any]) -> str:
    """Text that is JSON and valid by the schema."""
    return f"start: {_json(schema)}"


def of_any_object() -> str:
    """Text that is a JSON object."""
    return of_schema({"type": "object"})


def of_regex(pattern: str) -> str:
    """Text that matches as a whole."""
    return f"start: {_regex(pattern)}"


def of_choice(choices: Sequence[str]) -> str:
    """One of the texts."""
    return "start: " + " | ".join(map(_literal, choices))


def of_tool_calls(functions: Mapping[str, Mapping[str, Any]], *, is_forced: bool, is_single: bool) -> str:
    """Calls of the functions, by name and the schema of their arguments, in the form that `tasks.tool_calls` reads:
    one, or at least one. Where none is forced, any text may stand before them or in their place."""
    more = "" if is_single else f' ("\\n{BEGIN}" call)*'
    if is_forced:
        rules = [f'start: "{BEGIN}" call{more}']
    else:
        # A greedy text would take the beginning of a call in and could not go on.
        rules = [
            f"start: TEXT | before call{more}",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*){BEGIN}(?s:.*)/",
            f"before[lazy]: /(?s:.*){BEGIN}/",
        ]
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(functions))))
    for number, (name, arguments) in enumerate(functions.items()):
        head = f'{{"name": {json.dumps(name)}, "arguments": '
        rules.append(f'call_{number}: {_literal(head)} arguments_{number} "}}{END}"')
        rules.append(f"arguments_{number}: {_json({**arguments, 'type': 'object'})}")
    return "\n".join(rules)


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + orjson.dumps({**closed(schema), "x-guidance": _ONE_LINE}).decode()


def _regex(pattern: str) -> str:
    return "/" + _SLASH.sub(lambda found: found[1] or r"\/", pattern) + "/"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
