"""Records of public data sets: one JSON value to one conversation, its format known by its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, zip_longest
from typing import Any

from prism_trt.errors import PrismError

Message = dict[str, str]
"""``role`` (system, user or assistant) and ``content``."""

FORMS = (
    '{"messages": [{"role": "...", "content": "..."}, ...]}, {"conversations": [{"from": "...", "value": "..."}, ...]}'
    ', {"data": ["...", ...]}, {"turns": ["...", ...]} or {"prompt": "..."}'
)

_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}
_ALTERNATING = ("user", "assistant")
_THINKING = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
_SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")

_RawMessage = tuple[str, str | None]
"""Role as the data set spells it, and text; None for an answer that the format does not hold."""


@dataclass(frozen=True)
class Turn:
    """A user message and its answer."""

    user: str
    answer: str | None
    """The data set's answer; None when it has none."""


@dataclass(frozen=True)
class Conversation:
    """One usable record."""

    system: str | None
    turns: tuple[Turn, ...]
    """At least one."""
    thinking_removed: bool = False


class UnusableRecord(ValueError):
    """A record of a known format that holds no usable conversation; the message is the reason."""


def record_format(record: object) -> str:
    """The key that holds the conversation of `record`, which names its format.

    Raises:
        PrismError: it has none of the known keys.
    """
    if isinstance(record, dict):
        for key in _READERS:
            if record.get(key) is not None:
                return key
    raise PrismError(f"a record must be {FORMS}")


def parse_record(record: Any) -> Conversation:
    """The conversation of a record that has a `record_format`.

    Thinking in front of an answer is removed, and so is a system prompt that asks for it in those markers.

    Raises:
        PrismError: the value under its key is of another shape than the format says.
        UnusableRecord: it is of that shape, but not a conversation in which user and assistant take turns.
    """
    key = record_format(record)
    messages = _READERS[key](record[key], record)
    if messages is None:
        raise PrismError(f'"{key}" does not hold what it should, a record must be {FORMS}')
    return _conversation(messages, record.get("system"))


def remove_thinking(answer: str) -> str:
    """`answer` without the thinking in front of it and without solution markers, outer white space removed.

    Thinking that never ends leaves nothing; an end without a beginning counts (the beginning is then in the prompt, as
    with DeepSeek-R1).
    """
    for begin, end in _THINKING:
        before, ended, after = answer.partition(end)
        leading = before.lstrip().startswith(begin)
        if leading or (ended and begin not in before):
            answer = after
    return answer.strip().removeprefix(_SOLUTION[0]).removesuffix(_SOLUTION[1]).strip()


def _conversation(messages: list[_RawMessage], system: object) -> Conversation:
    """Pair the messages up; the first may be a system message."""
    if messages and _ROLES.get(messages[0][0].lower()) == "system":
        system, messages = messages[0][1], messages[1:]
    if not messages:
        raise UnusableRecord("no messages")
    for index, ((name, text), expected) in enumerate(zip(messages, cycle(_ALTERNATING), strict=False)):
        role = _ROLES.get(name.lower())
        if role is None:
            raise UnusableRecord("a role that is not system, user or assistant")
        if role != expected:
            raise UnusableRecord("starts with an answer" if index == 0 else "roles do not alternate")
        if text is not None and not text.strip():
            raise UnusableRecord("an empty message")
        if text is not None and not _is_unicode(text):
            raise UnusableRecord("half of a surrogate pair, which is no character")
    texts = [text for _, text in messages]
    given = texts[1::2]
    answers = [answer if answer is None else remove_thinking(answer) for answer in given]
    if "" in answers:
        raise UnusableRecord("an answer that is only thinking")
    turns = tuple(Turn(str(user), answer) for user, answer in zip_longest(texts[::2], answers))
    thinking_removed = any(old is not None and old.strip() != new for old, new in zip(given, answers, strict=True))
    return Conversation(_usable_system(system), turns, thinking_removed)


def _usable_system(system: object) -> str | None:
    """`system` unless it is blank, broken, or asks for thinking in markers that are removed from the answers."""
    if not isinstance(system, str) or not system.strip() or not _is_unicode(system):
        return None
    return None if any(begin in system for begin, _ in _THINKING) else system


def _is_unicode(text: str) -> bool:
    """Whether `text` can be encoded; JSON may hold half of a surrogate pair, which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_messages(value: Any, record: dict[str, Any]) -> list[_RawMessage] | None:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    pairs: list[_RawMessage] = []
    for message in value:
        role = message.get("role", message.get("from"))
        text = message.get("content", message.get("value", _MISSING))
        if not isinstance(role, str) or not (text is None or isinstance(text, str)):
            return None
        pairs.append((role, text or ""))
    return pairs


def _read_alternating(value: Any, record: dict[str, Any]) -> list[_RawMessage] | None:
    if not _is_list_of_strings(value):
        return None
    return [(role, text) for role, text in zip(cycle(_ALTERNATING), value, strict=False)]


def _read_turns(value: Any, record: dict[str, Any]) -> list[_RawMessage] | None:
    if not _is_list_of_strings(value):
        return None
    return [message for text in value for message in (("assistant", None), ("user", text))][1:]


def _read_prompt(value: Any, record: dict[str, Any]) -> list[_RawMessage] | None:
    return [("user", value)] if isinstance(value, str) else None


def _read_instruction(value: Any, record: dict[str, Any]) -> list[_RawMessage] | None:
    more = record.get("input")
    if isinstance(value, str) and isinstance(more, str) and more.strip():
        value = f"{value}\n\n{more}"
    return _read_prompt(value, record)


def _is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


_MISSING = object()
_READERS: dict[str, Callable[[Any, dict[str, Any]], list[_RawMessage] | None]] = {
    # Records of several forms, such as UltraChat 200k's "prompt" and "messages", are read in the richest one.
    "messages": _read_messages,
    "conversations": _read_messages,
    "conversation": _read_messages,
    "data": _read_alternating,
    "turns": _read_turns,
    "prompt": _read_prompt,
    "instruction": _read_instruction,
    "text": _read_prompt,
}
