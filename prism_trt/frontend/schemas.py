"""Requests of OpenAI's API as far as this server supports them.

A parameter whose feature is absent here is accepted with the value that asks for nothing and refused with any other;
what OpenAI does not know is refused. `top_k` is an addition.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from prism_trt.client.generate import Options
from prism_trt.config import StrictModel
from prism_trt.frontend.errors import ApiError

MOST_STOP_WORDS = 64
_DEFAULT_COMPLETION_TOKENS = 16


def _only(*neutral: Any) -> PlainValidator:
    """A parameter that may be absent, null or one of `neutral`."""

    def check(value: Any) -> None:
        if value is not None and value not in neutral:
            allowed = f"leave it out or send {neutral[0]!r}" if neutral else "leave it out"
            raise PydanticCustomError("unsupported_value", "not supported here: {allowed}", {"allowed": allowed})

    return PlainValidator(check)


def _text_of_parts(content: Any) -> Any:
    """Messages may come in parts; only text can be understood here."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise PydanticCustomError("unsupported_value", "only parts of type text are supported")
    return "".join(part["text"] for part in content)


def _one_prompt(prompt: Any) -> Any:
    if not isinstance(prompt, list):
        return prompt
    if len(prompt) != 1 or not isinstance(prompt[0], str):
        raise PydanticCustomError("unsupported_value", "only one prompt, as text, is supported per request")
    return prompt[0]


def _whole_characters(text: str) -> str:
    """JSON can hold halves of characters, which are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("invalid_unicode", "holds half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Refused = Annotated[Any, _only()]
Zero = Annotated[Any, _only(0)]
Empty = Annotated[Any, _only([], {})]


class Body(StrictModel):
    """JSON that is taken as it is: no number is read from a text."""

    model_config = ConfigDict(strict=True)


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, _only(False)] = None


class GenerationRequest(Body):
    """What both endpoints share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: (
        Annotated[
            list[Text],
            Field(max_length=MOST_STOP_WORDS),
            BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[Text, Field(max_length=256)] | None = None
    """Shares the server fairly with other users where no API keys tell clients apart."""

    n: Annotated[Any, _only(1)] = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Empty = None

    @property
    def longest(self) -> tuple[str, int | None]:
        """The parameter that limits the answer, and its value in tokens."""
        return "max_tokens", self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Alternatives to name for each token with their log-probabilities; None: no log-probabilities.

        Raises:
            ApiError: the parameters contradict each other.
        """
        return None

    def options(self, model: str, limit: int, timeout: float, client: str | None) -> Options:
        """The server's settings for this request. Sampling defaults are OpenAI's: temperature 1, top_p 1.

        Args:
            model: name of the served model.
            limit: longest answer that may be asked for, in tokens, and what a request that says nothing gets.
            timeout: longest silence of the server, in seconds.
            client: the holder of the API key; None: there are no keys.

        Raises:
            ApiError: the request asks for more, or its parameters contradict each other.
        """
        name, tokens = self.longest
        if tokens is not None and tokens > limit:
            raise ApiError(400, f"{name} is {tokens}: this server allows at most {limit}", name, "invalid_value")
        return Options(
            model=model,
            max_tokens=tokens or limit,
            chat=False,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=None if self.seed is None else self.seed % 2**64,
            stop=tuple(self.stop or ()),
            log_probs=self.alternatives,
            user=self.user or "" if client is None else client,
            timeout=timeout,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_text_of_parts)]

    # What an answer of this API holds when it is sent back as it came.
    refusal: Refused = None
    annotations: Empty = None
    audio: Refused = None
    tool_calls: Empty = None
    function_call: Refused = None
    name: Refused = None


class ChatRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    audio: Refused = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    functions: Empty = None
    metadata: Empty = None
    modalities: Annotated[Any, _only(["text"])] = None
    parallel_tool_calls: Annotated[Any, _only(True, False)] = None
    prediction: Refused = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    service_tier: Annotated[Any, _only("auto", "default")] = None
    store: Annotated[Any, _only(False)] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    tools: Empty = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    verbosity: Refused = None
    web_search_options: Refused = None

    @property
    def longest(self) -> tuple[str, int | None]:
        """`max_tokens` is the former name of `max_completion_tokens`."""
        if self.max_completion_tokens is None:
            return super().longest
        return "max_completion_tokens", self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """`top_logprobs`, which needs `logprobs`."""
        if not self.logprobs and self.top_logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: send logprobs true", "top_logprobs", "invalid_value")
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def conversation(self) -> list[dict[str, str]]:
        """The messages as chat templates take them; these know no role "developer"."""
        return [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in self.messages
        ]


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: Annotated[str, Field(min_length=1), AfterValidator(_whole_characters), BeforeValidator(_one_prompt)]

    best_of: Annotated[Any, _only(1)] = None
    echo: Annotated[Any, _only(False)] = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: Refused = None

    @property
    def longest(self) -> tuple[str, int | None]:
        """OpenAI's default is short."""
        return "max_tokens", self.max_tokens or _DEFAULT_COMPLETION_TOKENS

    @property
    def alternatives(self) -> int | None:
        """`logprobs` is a number here."""
        return self.logprobs
