"""Which prompts of a conversation the target is asked."""

from __future__ import annotations

from collections.abc import Sequence

from prism_trt.data.records import Conversation, Message


def planned_prompts(conversation: Conversation, turns: int | None = None) -> list[list[Message]]:
    """The prompts that can be asked before anything is answered: each up to and including a user message.

    The turns before that message carry the data set's own answers, so a turn without an answer is the last one asked.

    Args:
        turns: ask the first so many turns; None: only the last one, with everything before it.
    """
    answers: list[str] = []
    for turn in conversation.turns[:-1]:
        if turn.answer is None:
            break
        answers.append(turn.answer)
    asked = [len(answers)] if turns is None else range(min(turns, len(answers) + 1))
    return [_prompt(conversation, answers[:before]) for before in asked]


def next_prompt(conversation: Conversation, answers: Sequence[str], turns: int | None = None) -> list[Message] | None:
    """What to ask a target that gave `answers` to the first turns; None when it has been asked everything.

    Args:
        turns: ask the first so many turns; None: all.
    """
    wanted = len(conversation.turns) if turns is None else min(turns, len(conversation.turns))
    return _prompt(conversation, answers) if len(answers) < wanted else None


def _prompt(conversation: Conversation, answers: Sequence[str]) -> list[Message]:
    """The messages up to the user message of turn ``len(answers)``."""
    messages = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    for turn, answer in zip(conversation.turns, answers, strict=False):
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": conversation.turns[len(answers)].user}]
