"""What requests may say and how answers look: https://platform.openai.com/docs/api-reference.

What would change an answer and is not supported is refused, not ignored; so is a misspelt name.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

TokenIds = Annotated[list[int], Field(min_length=1)]
MAX_TEXTS = 128  # prompts of one request


class Body(pydantic.BaseModel):
    """A part of a request, of known names and types."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Settings(Body):
    """What completions and chats have in common."""

    model: str | None = None  # that of /v1/models
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None  # None: 1
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None  # None: another one each time
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Taken in the values that change nothing.
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # About the one who asks, or what is kept, which is nothing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    @pydantic.field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: Any) -> Any:
        if stop is not None and "" in ([stop] if isinstance(stop, str) else stop):
            raise ValueError("expected texts of a character or more")
        return stop

    @property
    def stops(self) -> list[str]:
        """Texts before which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Settings):
    """The body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_TEXTS)]
    )
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts: texts, or token ids."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class Part(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None

    @property
    def said(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content
        whole = text if isinstance(text, str) else "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": whole}


class ChatRequest(Settings):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class Answers:
    """The answers to one request, whole or piece by piece."""

    def __init__(self, name: str, chat: bool):
        self.chat = chat
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, texts: list[str], ends: list[str], usage: dict[str, Any]) -> dict[str, Any]:
        """All texts, and why each ended."""
        choices = []
        for i, (text, end) in enumerate(zip(texts, ends, strict=True)):
            said = {"message": {"role": "assistant", "content": text}}
            choices.append(self._choice(i, said if self.chat else {"text": text}, end))
        kind = "chat.completion" if self.chat else "text_completion"
        return self.head | {"object": kind, "choices": choices, "usage": usage}

    def piece(self, index: int, text: str, end: str | None = None, first: bool = False):
        """More of one text; `end`: why it ended."""
        said = {"role": "assistant"} if first else {}
        if text or first:
            said |= {"content": text}
        choice = self._choice(index, {"delta": said} if self.chat else {"text": text}, end)
        return self._chunk([choice])

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last piece of a stream, where it was asked for."""
        return self._chunk([]) | {"usage": usage}

    def _chunk(self, choices: list) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self.head | {"object": kind, "choices": choices}

    @staticmethod
    def _choice(index: int, said: dict[str, Any], end: str | None) -> dict[str, Any]:
        return {"index": index, **said, "logprobs": None, "finish_reason": end}


def usage(prompts: int, reused: int, new: int) -> dict[str, Any]:
    """The tokens that a request took; those of prompts that earlier texts had are "cached"."""
    counts = {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new}
    return counts | {"prompt_tokens_details": {"cached_tokens": reused}}


def refusal(message: str, param: str | None = None, code: str | None = None, kind: str = ""):
    """The body of an answer that is an error."""
    error = {"message": message, "type": kind or "invalid_request_error"}
    return {"error": error | {"param": param, "code": code}}
