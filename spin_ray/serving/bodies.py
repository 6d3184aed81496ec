"""Bodies of requests. Fields that steer engine or prompt (tools, …) are left out, so that pydantic refuses them."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16
"""Most prompts in a request, and most answers (``n``) to each prompt."""
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
_NOTHING: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "parallel_tool_calls": (True, False),
    "modalities": (["text"],), "best_of": (1,), "suffix": ("",), "echo": (False,), "min_tokens": (0,),
    "repetition_penalty": (1,), "length_penalty": (1,), "use_beam_search": (False,), "ignore_eos": (False,),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,),
    "include_obfuscation": (False,),
}  # fmt: skip
"""Neutral values of unsupported fields, besides null and empty ones: such a field is dropped, not refused."""
_ASKING_EMPTY = ("web_search_options",)
"""Unsupported fields whose empty object asks for something, too."""
_LABELS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


def _unicode(text: str) -> str:
    """Refuses lone surrogates, on which tokenizers fail."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "is not valid Unicode (a lone surrogate)") from None
    return text


Words = Annotated[str, AfterValidator(_unicode)]


def _few(stop: Any) -> Any:
    if isinstance(stop, list) and len(stop) > MAX_STOPS:
        raise PydanticCustomError(
            "too_many", "has {count} texts; at most {most} are allowed", {"count": len(stop), "most": MAX_STOPS}
        )
    return stop or None


Text = Annotated[Words, StringConstraints(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """A strict body: ``"5"`` is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if key in cls.model_fields or _asks(key, value)}


def _asks(field: str, value: Any) -> bool:
    """Tells whether an unsupported field asks for anything."""
    empty = () if field in _ASKING_EMPTY else ([], {})
    return value not in (None, *empty, *_NOTHING.get(field, ()))


class Sampling(Body):
    """Sampling settings; the defaults are vLLM's: temperature 1, nothing truncated."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """A field of vLLM. 0 or -1: no limit."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """A field of vLLM."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[
        Annotated[int, Field(ge=-1, le=2**63 - 1)] | None, AfterValidator(lambda seed: None if seed == -1 else seed)
    ] = None
    """The same seed gives the same answer while batches are alike. -1: none, as in vLLM."""
    stop: Annotated[Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None, BeforeValidator(_few)] = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer; at most ``serving.max_tokens``, and lowered to what fits beside the prompt."""

    @property
    def length_field(self) -> str:
        """Name of the field that limits the answer."""
        return "max_tokens"

    @property
    def longest(self) -> int | None:
        return getattr(self, self.length_field)


class StreamOptions(Body):
    include_usage: bool | None = None


class Request(Sampling):
    model: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def choices(self) -> int:
        return self.n or 1

    def for_engine(self, iterate: str, max_tokens: int) -> dict[str, Any]:
        fields = self.model_dump(exclude_none=True, exclude=set(_LABELS))
        return fields | {"model": iterate} | ({} if self.longest is not None else {"max_tokens": max_tokens})

    @model_validator(mode="after")
    def _usage_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options: is for streams only; set stream to true")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: Words


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    """``developer`` is OpenAI's newer name of ``system``."""
    content: Words | Annotated[list[TextPart], Field(min_length=1)]
    name: Any = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Conversation = Annotated[list[Message], Field(min_length=1, max_length=256)]


class ResponseFormat(Body):
    type: Literal["text"]


class ChatBody(Request):
    """``POST /v1/chat/completions``."""

    messages: Conversation
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def length_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def for_engine(self, iterate: str, max_tokens: int) -> dict[str, Any]:
        return super().for_engine(iterate, max_tokens) | {"messages": plain(self.messages)}

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs: needs logprobs to be true")
        return self


class CompletionBody(Request):
    """``POST /v1/completions``: text or token ids as they are, without a chat template."""

    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Longest answer to each prompt; at most ``serving.max_tokens`` and what fits. 0 with ``echo``: the prompt."""

    @model_validator(mode="after")
    def _nothing_but_the_prompt(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "max_tokens: 0 is allowed only with echo")
        return self

    @property
    def choices(self) -> int:
        many = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return (self.n or 1) * (len(self.prompt) if many else 1)


class GivenAnswer(Body):
    content: Words
    finish_reason: Literal["stop", "length"] = "stop"
    """``stop``: the end of the turn belongs to the answer and its log-probability."""


class CompareBody(Sampling):
    """``POST /v1/compare``: one conversation, several models, the same sampling and seed."""

    models: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=128)]], Field(min_length=2, max_length=8)
    ]
    messages: Conversation
    logprobs: bool = False
    """Log-probability of every answer under every model, too."""
    answers: list[GivenAnswer] | None = None
    """Answers to score in place of sampled ones, one per model, in order."""

    @model_validator(mode="after")
    def _an_answer_of_each(self) -> Self:
        if self.answers is not None and len(self.answers) != len(self.models):
            raise PydanticCustomError("answers_of_models", "answers: must be one per model")
        return self


def plain(messages: list[Message]) -> list[dict[str, str]]:
    """Returns messages with roles that chat templates know."""
    roles = {"developer": "system"}
    return [{"role": roles.get(message.role, message.role), "content": message.text} for message in messages]
