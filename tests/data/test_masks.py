"""Loss masks: what carries a loss is the answer and the end of its turn, whatever the chat template looks like."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_trt.data.masks import mask_answers, require_generation_prompt
from prism_trt.data.records import Message
from prism_trt.errors import PrismError
from tests.data.chat_templates import (
    APPENDING,
    GEMMA,
    LLAMA2,
    MISTRAL_V3,
    SMOLLM2,
    WITHOUT_GENERATION_PROMPT,
    ZEPHYR,
    Shape,
)

WORDS = st.lists(st.sampled_from(["the", "dog", "fox;", "1+1", "<b>", "a\nb", "[/INST]", "assistant"]), min_size=1)
TEXTS = WORDS.map(" ".join)


def conversation(*texts: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant")
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]


@pytest.mark.parametrize("name", APPENDING)
@given(texts=st.lists(TEXTS, min_size=2, max_size=6), system=st.none() | TEXTS)
@settings(max_examples=25, deadline=None)
def test_loss_is_on_the_answers_and_their_ends_alone(name: str, texts: list[str], system: str | None) -> None:
    shape = APPENDING[name]
    tokenizer = shape.tokenizer()
    messages = conversation(*texts, system=system if shape.system else None)
    masked = mask_answers(messages, tokenizer)
    assert masked.tokens == tokenizer.encode_chat(messages, add_generation_prompt=False)
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for answer, index in zip(masked.answers, places, strict=True):
        # What precedes the answer is the prompt that a server makes of the conversation so far.
        assert masked.tokens[: answer.start] == tokenizer.encode_chat(messages[:index], add_generation_prompt=True)
        text = tokenizer.decode([masked.tokens[position] for position in answer], skip_special_tokens=False)
        words, end, rest = text.rpartition(shape.eos)
        assert (words.strip(), end, rest) == (messages[index]["content"], shape.eos, "")
    assert sum(masked.mask) == sum(map(len, masked.answers))
    assert [position for position, carries in enumerate(masked.mask) if carries] == [
        position for answer in masked.answers for position in answer
    ]


def test_an_answer_without_an_end_of_turn_token_is_the_whole_turn() -> None:
    shape = Shape("{% for m in messages %}<s>{{ m.content }}\n{% endfor %}", eos="</s>")
    masked = mask_answers(conversation("dog", "the fox"), shape.tokenizer())
    assert shape.tokenizer().decode([masked.tokens[i] for i in masked.answers[0]], False) == "<s>the fox\n"


def test_templates_whose_beginnings_change_are_refused() -> None:
    tokenizer = MISTRAL_V3.tokenizer()
    assert mask_answers(conversation("dog", "fox", "dog", "fox"), tokenizer).answers
    with pytest.raises(PrismError, match="messages 1 to 2 differently once more follow"):
        mask_answers(conversation("dog", "fox", "dog", "fox", system="the"), tokenizer)


def test_tokens_that_grow_over_the_start_of_an_answer_are_refused() -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %} th{% endif %}{% endfor %}"
    tokenizer = Shape(template, eos="</s>").tokenizer()
    assert tokenizer.encode("dog the")[:-1] == tokenizer.encode("dog")
    with pytest.raises(PrismError, match="tokens of messages 1 to 1 change"):
        mask_answers(conversation("dog", "e"), tokenizer)
    assert mask_answers(conversation("dog", "</s>"), tokenizer).answers


@pytest.mark.parametrize(
    ("template", "texts", "reason"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", ("a", "b"), "leaves an answer out"),
        (SMOLLM2.template, ("a",), "has no answer"),
    ],
)
def test_empty_masks_are_refused(template: str, texts: tuple[str, ...], reason: str) -> None:
    with pytest.raises(PrismError, match=reason):
        mask_answers(conversation(*texts), Shape(template, eos="</s>").tokenizer())


def test_a_missing_generation_prompt_is_noticed() -> None:
    for shape in (SMOLLM2, LLAMA2, ZEPHYR, GEMMA, MISTRAL_V3):
        require_generation_prompt(shape.tokenizer())
    with pytest.raises(PrismError, match=r"ignores add_generation_prompt but writes '<\|im_start\|>assistant'"):
        require_generation_prompt(WITHOUT_GENERATION_PROMPT.tokenizer())
