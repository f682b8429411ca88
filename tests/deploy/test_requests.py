"""Conversations as prompts, without a server."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from prism_trt.deploy.requests import Generation, parse_generation
from prism_trt.errors import PrismError
from prism_trt.target.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Größe, 東京?"},
    {"role": "assistant", "content": "dog"},
    {"role": "user", "content": ""},
]


def parse(tokenizer: Tokenizer, text: str, messages: str, context: int = 512, **others: Any) -> Generation:
    inputs = {
        "text_input": np.array([[text.encode()]], dtype=np.object_),
        "messages": np.array([[messages.encode()]], dtype=np.object_),
        "max_tokens": np.array([[4]], dtype=np.int32),
        **others,
    }
    return parse_generation(inputs, {}, tokenizer, None, context)


def test_a_conversation_is_rendered_once() -> None:
    fast = FastTokenizer.from_str(tiny_tokenizer()._fast.to_str())
    start = "<|endoftext|>"
    fast.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, fast.token_to_id(start))])
    tokenizer = Tokenizer(fast, tiny_tokenizer().settings)
    generation = parse(tokenizer, "", json.dumps(CONVERSATION))
    assert generation.request.prompt == tokenizer.encode_chat(CONVERSATION)
    assert generation.prefix == tokenizer.render_chat(CONVERSATION)
    assert generation.request.prompt[0] != fast.token_to_id(start)
    # An empty input asks for nothing.
    plain = parse(tokenizer, "fox", "")
    assert plain.request.prompt == tokenizer.encode("fox")
    assert plain.request.prompt[0] == fast.token_to_id(start)


@pytest.mark.parametrize(
    ("text", "messages", "sentence"),
    [
        ("fox", json.dumps(CONVERSATION), "text_input and messages are both given"),
        ("", "", "text_input is empty"),
        ("", "dog", "messages is no conversation"),
        ("", "[]", "messages is no conversation"),
        ("", "[" * 10_000, "messages is no conversation"),
        ("", '[{"role": "user"}]', "messages is no conversation .Field required"),
        ("", '[{"role": "user", "content": "a", "name": "b"}]', "messages is no conversation .Extra inputs"),
        ("", '[{"role": "user", "content": [1]}]', "messages is no conversation"),
        ("", json.dumps([{"role": "user", "content": "a" * 10**5}]), "the prompt has 100033 bytes"),
        ("", json.dumps([{"role": "user", "content": "é" * 300}], ensure_ascii=False), "but the context is 512"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_sentence(text: str, messages: str, sentence: str) -> None:
    with pytest.raises(PrismError, match=sentence) as refused:
        parse(tiny_tokenizer(), text, messages)
    assert "\n" not in str(refused.value)


def test_log_probabilities_are_asked_for_in_two_ways() -> None:
    def alternatives(**others: Any) -> int | None:
        return parse(tiny_tokenizer(), "fox", "", **others).request.log_probs

    assert alternatives() is None
    assert alternatives(return_log_probs=np.array([[False]])) is None
    assert alternatives(return_log_probs=np.array([[True]])) == 0
    assert alternatives(top_log_probs=np.array([[0]], dtype=np.int32)) == 0
    assert alternatives(top_log_probs=np.array([[5]], dtype=np.int32), return_log_probs=np.array([[True]])) == 5


def test_requests_have_a_user() -> None:
    user = np.array([["Größe".encode()]], dtype=np.object_)
    assert parse(tiny_tokenizer(), "fox", "", user=user).user == "Größe"
    assert parse(tiny_tokenizer(), "fox", "").user == ""
