"""Records of public data sets, clean and dirty."""

from __future__ import annotations

from typing import Any

import pytest

from prism_trt.data.records import Conversation, Turn, UnusableRecord, parse_record, record_format, remove_thinking
from prism_trt.data.turns import next_prompt, planned_prompts
from prism_trt.errors import PrismError


def said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": name, "value": text} for name, text in pairs]


ONE, TWO = Turn("q", "a"), Turn("more", "b")
R1 = "<think>\nhm <b>\n</think>\n\na"
THOUGHTS = "<|begin_of_thought|>hm<|end_of_thought|>\n\n<|begin_of_solution|>\n\na\n\n<|end_of_solution|>"


@pytest.mark.parametrize(
    ("name", "record", "conversation"),
    [
        ("conversations", {"id": "x", "conversations": said(("human", "q"), ("gpt", "a"))}, Conversation(None, (ONE,))),
        (
            "conversations",
            {"conversations": said(("system", "s"), ("user", "q"), ("chatgpt", "a"), ("human", "more"), ("bing", "b"))},
            Conversation("s", (ONE, TWO)),
        ),
        (
            "conversations",
            {"system": "s", "conversations": said(("Human", "q"), ("GPT", "a"), ("human", "more"))},
            Conversation("s", (ONE, Turn("more", None))),
        ),
        ("conversations", {"conversations": said(("user", "q"), ("assistant", R1))}, Conversation(None, (ONE,), True)),
        (
            "conversations",
            {"system": "Use <|begin_of_thought|>.", "conversations": said(("user", "q"), ("assistant", THOUGHTS))},
            Conversation(None, (ONE,), True),
        ),
        ("conversation", {"conversation": [{"role": "user", "content": "q"}]}, Conversation(None, (Turn("q", None),))),
        (
            "messages",
            {
                "prompt": "ignored",
                "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " a\n"}],
            },
            Conversation(None, (ONE,)),
        ),
        ("data", {"id": "0", "data": ["q", "a", "more", "b"]}, Conversation(None, (ONE, TWO))),
        (
            "turns",
            {"question_id": 81, "category": "writing", "turns": ["q", "more"]},
            Conversation(None, (Turn("q", None), Turn("more", None))),
        ),
        ("prompt", {"prompt": "q", "source": "ignored"}, Conversation(None, (Turn("q", None),))),
        ("text", {"text": " q"}, Conversation(None, (Turn(" q", None),))),
        ("instruction", {"instruction": "q", "input": "", "output": "a"}, Conversation(None, (Turn("q", None),))),
        ("instruction", {"instruction": "q", "input": "x"}, Conversation(None, (Turn("q\n\nx", None),))),
    ],
)
def test_formats_are_known_by_their_keys(name: str, record: dict[str, Any], conversation: Conversation) -> None:
    assert record_format(record) == name
    assert parse_record(record) == conversation


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": []}, "no messages"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no messages"),
        ({"conversations": said(("gpt", "a"), ("human", "q"))}, "starts with an answer"),
        ({"conversations": said(("human", "q"), ("human", "q"))}, "roles do not alternate"),
        ({"conversations": said(("human", "q"), ("tool", "a"))}, "a role that is not"),
        ({"conversations": said(("human", "q"), ("gpt", " \n"))}, "an empty message"),
        ({"conversations": [{"from": "human", "value": None}]}, "an empty message"),
        ({"conversations": said(("human", "q"), ("gpt", "<think>never ends"))}, "only thinking"),
        ({"data": ["q", ""]}, "an empty message"),
        ({"turns": []}, "no messages"),
        ({"prompt": " "}, "an empty message"),
        ({"prompt": "half \ud83d"}, "half of a surrogate pair"),
    ],
)
def test_dirty_conversations_are_unusable_for_a_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRecord, match=reason):
        parse_record(record)


@pytest.mark.parametrize(
    "record",
    [
        ["prompt"],
        "prompt",
        {"question": "q"},
        {"prompt": None},
        {"prompt": 3},
        {"messages": "q"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"content": "q"}]},
        {"conversations": ["q"]},
        {"data": [["q"]]},
        {"turns": "q"},
    ],
)
def test_other_shapes_are_refused(record: Any) -> None:
    with pytest.raises(PrismError, match="a record must be"):
        parse_record(record)


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("  a  ", "a"),
        (R1, "a"),
        ("hm\n</think>\na", "a"),
        ("<think></think>a</think>", "a</think>"),
        ("Write <think> and </think> around it.", "Write <think> and </think> around it."),
        (THOUGHTS, "a"),
        ("<|begin_of_thought|>hm", ""),
    ],
)
def test_thinking_is_removed_in_front_of_an_answer_only(answer: str, rest: str) -> None:
    assert remove_thinking(answer) == rest


def texts(prompts: list[list[dict[str, str]]]) -> list[str]:
    return [" ".join(message["content"] for message in prompt) for prompt in prompts]


def test_prompts_planned_ahead_have_the_history_of_the_data() -> None:
    whole = Conversation("s", (ONE, TWO))
    assert texts(planned_prompts(whole)) == ["s q a more"]
    assert texts(planned_prompts(whole, turns=1)) == ["s q"]
    assert texts(planned_prompts(whole, turns=5)) == ["s q", "s q a more"]
    assert [message["role"] for message in planned_prompts(whole)[0]] == ["system", "user", "assistant", "user"]
    unanswered = Conversation(None, (Turn("q", None), Turn("more", None)))
    assert texts(planned_prompts(unanswered)) == texts(planned_prompts(unanswered, turns=2)) == ["q"]


def test_next_prompts_have_the_history_of_the_target() -> None:
    conversation = Conversation(None, (Turn("q", "of the data"), Turn("more", None), Turn("last", None)))
    assert texts([next_prompt(conversation, []) or []]) == ["q"]
    assert texts([next_prompt(conversation, ["A", "B"]) or []]) == ["q A more B last"]
    assert next_prompt(conversation, ["A", "B", "C"]) is None
    assert next_prompt(conversation, ["A", "B"], turns=2) is None
