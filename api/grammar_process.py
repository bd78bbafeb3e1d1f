"""The process that compiles strangers' grammars, so that none of them can hold up or blow up a gateway.

`python -I grammar_process.py` reads requests (a line with the length, then so many bytes of grammar) and answers each
with a line of JSON. A grammar that takes too much of the processor or of the memory ends the process: that is the
answer then. Imports nothing of the project, and takes 22 MB.
"""

import json
import re
import resource
import signal
import sys

import llguidance

CPU_S = 0.3
MEMORY_BYTES = 512 * 2**20
_KEYWORDS = frozenset(
    {
        "$dynamicRef", "$recursiveRef", "allOf", "contains", "contentEncoding", "contentMediaType",
        "dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxContains",
        "maxProperties", "minContains", "minProperties", "multipleOf", "not", "oneOf", "patternProperties",
        "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
    }
)  # fmt: skip
_NAMING = [
    re.compile(r"JSON schema: Unimplemented keys: (\[.*?\])"),
    re.compile(r"JSON schema: (oneOf) constraints are not supported"),
]
_WORD = re.compile(r"[$A-Za-z]+")
_COSTLY = re.compile(r"too (large|complex|many|deep|big)|limit|fuel|exceed", re.IGNORECASE)


def verdict(grammar: str, tokenizer: llguidance.LLTokenizer) -> dict[str, object]:
    """Whether the grammar can be used; if not, whether it is only too costly, and which of JSON Schema's own words
    it uses that nobody here can enforce. Nothing else of the grammar is said."""
    try:
        # Written in Python, and of GBNF alone: deep nesting ends in a RecursionError.
        compiled = llguidance.grammar_from("grammar", grammar)
    except (ValueError, RecursionError):
        return {"is_valid": False}
    matcher = llguidance.LLMatcher(tokenizer, compiled, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        return {"is_valid": True}
    reason = matcher.get_error().partition("\n")[0]
    named = {word for pattern in _NAMING for found in pattern.findall(reason) for word in _WORD.findall(found)}
    is_costly = _COSTLY.search(reason) is not None
    return {"is_valid": False, "is_costly": is_costly, "keywords": sorted(named & _KEYWORDS)}


def main() -> None:
    """Answer until the gateway is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = llguidance.LLTokenizer("byte")
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while line := requests.readline():
        grammar = requests.read(int(line)).decode()
        # Counts what the process computes, not what it waits for; at zero the signal ends the process.
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            found = verdict(grammar, tokenizer)
        except MemoryError:
            found = {"is_valid": False, "is_costly": True}
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(found).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
