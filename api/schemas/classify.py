"""POST /v1/classify: vLLM's request."""

from typing import ClassVar

from api.schemas.fields import COMMON_NO_EFFECT, CallModel, EchoOptions, Inputs, Label, ModelName
from tasks.call import Call


class ClassifyRequest(CallModel):
    """Texts or lists of token ids (with the model's special tokens in place)."""

    model: ModelName
    input: Inputs
    user: Label | None = None
    options: EchoOptions | None = None

    task: ClassVar = "classify"
    no_effect: ClassVar = {
        **COMMON_NO_EFFECT,
        "add_special_tokens": (None, True),
        "use_activation": (None, True),
        "softmax": (None, True),
        "activation": (None, True),
    }

    def to_call(self) -> Call:
        return Call(
            endpoint="/v1/classify",
            task=self.task,
            model=self.model,
            inputs=self.input,
            options=self.options.given() if self.options else {},
        )
