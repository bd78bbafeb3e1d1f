"""Grammars in vLLM: advanced over what an earlier attempt has sent, failing aloud, compiled in the EngineCore alone.

vLLM starts a grammar at the first token that it generates itself. A call that goes on after `prompt + resumed` has
its grammar in the middle, which nothing in vLLM's API can say; the number of resumed tokens travels in
`SamplingParams.extra_args`.

`backends.vllm_orphans` calls `register`, because vLLM must not be without it.
"""

from typing import Any

LIBRARY = "guidance"
"""llguidance: bounds its own work at each step, and the gateway and the gpt backend read the same grammars with it."""

RESUMED = "switchyard_resumed"


def leave_checking_to_the_gateway() -> None:
    """In the worker. vLLM compiles every grammar once more before its EngineCore does, on the event loop, and n times
    for n choices: grammars at the gateway's limit would hold up the worker's heartbeats."""
    from vllm.v1.structured_output import backend_guidance

    backend_guidance.validate_guidance_grammar = lambda *_, **__: None


def register() -> None:
    """In an EngineCore process."""
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.backend_guidance import GuidanceGrammar

    create = StructuredOutputManager._create_grammar  # noqa: SLF001  (vLLM offers no place for this)
    accept = GuidanceGrammar.accept_tokens

    def create_advanced(manager: Any, request: Any) -> Any:
        grammar = create(manager, request)
        if num_resumed := (request.sampling_params.extra_args or {}).get(RESUMED, 0):
            resumed = list(request.prompt_token_ids[-num_resumed:])
            if not grammar.accept_tokens(request.request_id, resumed):
                raise ValueError("the tokens already sent do not follow the grammar")
        return grammar

    def accept_or_fail(grammar: Any, request_id: str, tokens: list[int]) -> bool:
        # Out of its bounds llguidance ends the text as if it were whole.
        return accept(grammar, request_id, tokens) and not grammar.ll_matcher.is_error()

    StructuredOutputManager._create_grammar = create_advanced  # noqa: SLF001
    GuidanceGrammar.accept_tokens = accept_or_fail
