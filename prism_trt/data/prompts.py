"""Training prompts: JSONL records to token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_trt.errors import PrismError
from prism_trt.target.tokenizer import Tokenizer

_FORMS = '{"prompt": "..."}, {"turns": ["...", ...]} or {"messages": [{"role": "...", "content": "..."}, ...]}'


@dataclass(frozen=True)
class PromptSet:
    """Prompts as the target sees them, chat template applied."""

    prompts: list[list[int]]
    too_long: int
    """Records dropped because they exceed the token limit."""
    duplicates: int
    """Records dropped because an earlier one renders to the same tokens."""


def read_messages(path: Path) -> list[list[dict[str, str]]]:
    """Read one conversation per line of a JSONL file; other keys of a record are ignored.

    Of ``turns`` the first is kept: later user turns belong after answers that do not exist yet. Of ``messages``
    everything up to the last user message is kept.

    Raises:
        PrismError: the file cannot be read or is empty, or a line is not a record, by line number.
    """
    path = Path(path)
    conversations = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    conversations.append(_messages(line, f"{path}, line {number}"))
    except OSError as error:
        raise PrismError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PrismError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not conversations:
        raise PrismError(f"{path} holds no prompts: write one JSON object per line, {_FORMS}")
    return conversations


def tokenize_prompts(conversations: list[list[dict[str, str]]], tokenizer: Tokenizer, max_tokens: int) -> PromptSet:
    """Render conversations with the chat template and its generation prompt; drop long ones and repetitions.

    Raises:
        PrismError: no prompt is left, or the tokenizer has no chat template.
    """
    kept: dict[tuple[int, ...], None] = {}
    too_long = duplicates = 0
    for messages in conversations:
        ids = tuple(tokenizer.encode_chat(messages, add_generation_prompt=True))
        if len(ids) > max_tokens:
            too_long += 1
        elif ids in kept:
            duplicates += 1
        else:
            kept[ids] = None
    if not kept:
        raise PrismError(
            f"none of the {len(conversations)} prompts has {max_tokens} tokens or fewer: raise --max-prompt-tokens"
        )
    return PromptSet([list(ids) for ids in kept], too_long, duplicates)


def _messages(line: str, where: str) -> list[dict[str, str]]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise PrismError(f"{where}: not valid JSON ({error})") from None
    if isinstance(record, dict):
        if isinstance(record.get("prompt"), str) and record["prompt"].strip():
            return [{"role": "user", "content": record["prompt"]}]
        turns = record.get("turns")
        if isinstance(turns, list) and turns and isinstance(turns[0], str) and turns[0].strip():
            return [{"role": "user", "content": turns[0]}]
        if messages := _until_last_user(record.get("messages")):
            return messages
    raise PrismError(f"{where}: a record must be {_FORMS}")


def _until_last_user(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list):
        return []
    for message in messages:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            return []
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return [{key: m[key] for key in ("role", "content")} for m in messages[: users[-1] + 1]] if users else []
