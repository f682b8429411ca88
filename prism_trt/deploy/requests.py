"""From a request's tensors to something the decoder can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from prism_trt.config import StrictModel, parse
from prism_trt.deploy.interface import INPUTS, NEUTRAL, REQUIRED
from prism_trt.errors import PrismError
from prism_trt.speculative.request import Request, RequestTree
from prism_trt.speculative.sampling import SamplingParams
from prism_trt.target.tokenizer import Tokenizer

_BYTES_PER_TOKEN = 128
"""No tokenizer in use packs more of a text into each token on average."""
_MOST_STOP_WORDS = 64
_MOST_USER_BYTES = 1024
_PARAMETERS_OF_TRITON = "triton_"


class Message(StrictModel):
    """One turn of a conversation."""

    role: str
    content: str


_CONVERSATION = TypeAdapter(Annotated[list[Message], Field(min_length=1)])


@dataclass(frozen=True)
class Generation:
    """A valid request."""

    request: Request
    stream: bool
    prefix: str
    """What the returned text begins with: the prompt, if the client wants it back."""
    user: str = ""
    """Whose it is: users share the server fairly."""


def parse_generation(
    inputs: Mapping[str, np.ndarray],
    parameters: Mapping[str, Any],
    tokenizer: Tokenizer,
    tree: RequestTree,
    context: int,
) -> Generation:
    """Validate one request.

    Args:
        inputs: tensors by name, of shape [1, n]; strings as bytes.
        parameters: request parameters; clients put what is no input there, so any is an error.
        tokenizer: the target's.
        tree: the draft tree to use.
        context: K/V entries per request.

    Raises:
        PrismError: anything about the request is wrong.
    """
    if unknown := sorted(name for name in parameters if not name.startswith(_PARAMETERS_OF_TRITON)):
        raise PrismError(f"{unknown[0]!r} is neither an input nor a parameter of this model: remove it")
    values = {name: _values(array) for name, array in inputs.items()}
    if missing := [name for name in REQUIRED if name not in values]:
        raise PrismError(f"the input {missing[0]} is missing: send it")
    for tensor in INPUTS:
        if tensor.size == 1 and tensor.name in values and len(values[tensor.name]) != 1:
            raise PrismError(f"{tensor.name} holds {len(values[tensor.name])} values: send one prompt per request")
    one: dict[str, Any] = {
        tensor.name: values[tensor.name][0] for tensor in INPUTS if tensor.size == 1 and tensor.name in values
    }
    for name, neutral in NEUTRAL.items():
        if one.get(name, neutral[0]) not in neutral:
            raise PrismError(f"{name}={one[name]} is not supported: leave it out or send {neutral[-1]}")
    if any(_texts("bad_words", values)):
        raise PrismError("bad_words are not supported: leave them out")

    prompt, text = _prompt(values, one.get("chat", False), tokenizer, context)
    stream = one.get("stream", False)
    request = Request(
        prompt=prompt,
        max_tokens=one["max_tokens"],
        sampling=_sampling(one),
        stop_words=_stop_words(values),
        eos_token_ids=_eos(one, tokenizer),
        tree=tree,
        log_probs=one.get("top_log_probs", 0 if one.get("return_log_probs") else None),
    )
    # As in TensorRT-LLM, streams never repeat the prompt.
    prefix = "" if stream or one.get("exclude_input_in_output", False) else text
    return Generation(request, stream, prefix, _user(values))


def parse_user(inputs: Mapping[str, np.ndarray]) -> str:
    """Whose a request is; empty where it does not say so.

    Raises:
        PrismError: it says so in an invalid way.
    """
    return _user({name: _values(array) for name, array in inputs.items() if name == "user"})


def _values(array: np.ndarray) -> list[Any]:
    values: list[Any] = array.reshape(-1).tolist()
    # The shortest decimal that is this float32: what the client wrote.
    return [float(str(np.float32(value))) for value in values] if array.dtype == np.float32 else values


def _texts(name: str, values: Mapping[str, list[Any]]) -> list[str]:
    try:
        return [value.decode() if isinstance(value, bytes) else str(value) for value in values.get(name, [])]
    except UnicodeDecodeError:
        raise PrismError(f"{name} is not valid UTF-8: encode it as UTF-8") from None


def _prompt(values: Mapping[str, list[Any]], chat: bool, tokenizer: Tokenizer, context: int) -> tuple[list[int], str]:
    """Tokens, and the text they stand for. The prompt is `text_input`, or a whole conversation in `messages`."""
    (text,), conversation = _texts("text_input", values), "".join(_texts("messages", values))
    if text and conversation:
        raise PrismError("text_input and messages are both given: leave one of them empty")
    if not text and not conversation:
        raise PrismError("text_input is empty: send a prompt")
    size = len((text or conversation).encode())
    if size > context * _BYTES_PER_TOKEN:
        raise PrismError(
            f"the prompt has {size} bytes, far more than the context of {context} tokens holds: shorten it"
        )
    if conversation:
        text = tokenizer.render_chat(_messages(conversation))
    elif chat:
        text = tokenizer.render_chat([{"role": "user", "content": text}])
    tokens = tokenizer.encode(text, add_special_tokens=not (chat or conversation))
    if len(tokens) > context:
        raise PrismError(f"the prompt has {len(tokens)} tokens but the context is {context}: shorten it")
    return tokens, text


def _messages(conversation: str) -> list[dict[str, str]]:
    try:
        return [message.model_dump() for message in _CONVERSATION.validate_json(conversation)]
    except ValidationError as error:
        raise PrismError(
            f"messages is no conversation ({error.errors()[0]['msg']}): send a JSON list of objects with role and "
            "content"
        ) from None


def _sampling(one: Mapping[str, Any]) -> SamplingParams:
    """Greedy unless asked otherwise. A top_p of 0 means "not set", as in TensorRT-LLM."""
    top_k, top_p = one.get("top_k", 0), one.get("top_p", 1.0) or 1.0
    narrowed = top_k != 0 or top_p != 1.0
    temperature = one.get("temperature", 1.0 if narrowed else 0.0)
    seed = one["seed"] % 2**63 if "seed" in one else None
    sampling = parse(
        SamplingParams, {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}, "sampling"
    )
    return SamplingParams() if top_k == 1 else sampling


def _stop_words(values: Mapping[str, list[Any]]) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(word for word in _texts("stop_words", values) if word))
    if len(words) > _MOST_STOP_WORDS:
        raise PrismError(f"there are {len(words)} stop words: send at most {_MOST_STOP_WORDS}")
    return words


def _user(values: Mapping[str, list[Any]]) -> str:
    user = "".join(_texts("user", values))
    if len(user.encode()) > _MOST_USER_BYTES:
        raise PrismError(f"user has {len(user.encode())} bytes: send at most {_MOST_USER_BYTES}")
    return user


def _eos(one: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The target's own ends of sequence, the client's instead, or, for -1, none."""
    end = one.get("end_id")
    if end is None:
        return tokenizer.eos_token_ids
    if not -1 <= end < tokenizer.vocab_size:
        raise PrismError(
            f"end_id={end} is no token of this model: send one below {tokenizer.vocab_size}, or -1 for none"
        )
    return () if end == -1 else (end,)
