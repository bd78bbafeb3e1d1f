"""Tool calls in a model's text: the one place that finds, names and hides them.

The form is Hermes's, which Qwen and many others are trained on: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.
Text whose calls cannot be read is text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tasks.call import Call
from tasks.identity import Identity
from tasks.output import overlap

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called."""

    name: str
    arguments: dict[str, Any]

    @property
    def arguments_json(self) -> str:
        return orjson.dumps(self.arguments).decode()


def of(call: Call, text: str) -> tuple[str, list[ToolCall]]:
    """What `text` says and what it calls, as far as the call allows tools."""
    if not call.format.get("tools"):
        return text, []
    content, calls = split(text)
    return content, calls[: call.format.get("most_tool_calls")]


def split(text: str) -> tuple[str, list[ToolCall]]:
    """The text before the first call, and the calls. What stands behind a call is not shown."""
    content, *pieces = text.split(BEGIN)
    calls = [_read(piece.partition(END)[0]) for piece in pieces]
    found = [call for call in calls if call is not None]
    return (content, found) if found and len(found) == len(calls) else (text, [])


def join(content: str, calls: Sequence[ToolCall]) -> str:
    """A text that `split` takes apart into the same."""
    spelled = [orjson.dumps({"name": call.name, "arguments": call.arguments}).decode() for call in calls]
    return content + "".join(f"{BEGIN}{call}{END}" for call in spelled)


def call_id(identity: Identity, choice: int, number: int) -> str:
    """The same whenever the answer is told again."""
    return f"call_{identity.job_id.hex}{choice:02x}{number:02x}"


class Visible:
    """What of a growing text can be shown: nothing from the first call's beginning on, until the end decides."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._text = ""
        self._num_shown = 0

    def push(self, text: str) -> str:
        """The text that can be shown now."""
        self._text += text
        begin = self._text.find(BEGIN, self._num_shown)
        return self._show(begin if begin >= 0 else len(self._text) - overlap(self._text, [BEGIN]))

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls."""
        content, calls = of(self._call, self._text)
        return self._show(len(content)), calls

    def _show(self, end: int) -> str:
        shown = self._text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        return shown


def _read(spelled: str) -> ToolCall | None:
    try:
        call = orjson.loads(spelled)
    except orjson.JSONDecodeError:
        return None
    if type(call) is not dict or type(call.get("name")) is not str:
        return None
    arguments = call.get("arguments", {})
    return ToolCall(call["name"], arguments) if type(arguments) is dict else None
