"""JSON Schemas whose objects have no other properties than those they name.

A schema that names properties and says nothing of others allows any others, and a small model then invents them
until max_tokens. What a closed schema describes is valid by the open one as well.
"""

from collections.abc import Mapping
from typing import Any

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")
_SPOKEN_OF = {"additionalProperties", "unevaluatedProperties"}
_COMBINED = {"anyOf", "oneOf", "$ref", "$dynamicRef", "if", "not", "dependentSchemas"}
"""Beside `properties`, these may name properties of the same object."""


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with its objects closed; as it is where several of its parts may describe one object."""
    return dict(schema) if _describes_twice(schema) else _closed(schema)


def _describes_twice(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_describes_twice, value))
    if not isinstance(value, dict):
        return False
    is_combined = "allOf" in value or ("properties" in value and not _COMBINED.isdisjoint(value))
    return is_combined or any(map(_describes_twice, value.values()))


def _closed(schema: Any) -> Any:
    """Looks only where a schema can stand: a property may be called "properties"."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for name in _MAPS:
        if isinstance(made.get(name), dict):
            made[name] = {key: _closed(inner) for key, inner in made[name].items()}
    for name in _LISTS:
        if isinstance(made.get(name), list):
            made[name] = [_closed(inner) for inner in made[name]]
    for name in _SINGLE:
        made |= {name: _closed(made[name])} if name in made else {}
    if isinstance(made.get("properties"), dict) and _SPOKEN_OF.isdisjoint(made):
        made["additionalProperties"] = False
    return made
