"""Training prompts: a file of records to token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from prism_trt.config import StrictModel
from prism_trt.data.accounting import DataReport
from prism_trt.data.duplicates import evaluation_grams, near_duplicates, repeats_evaluation
from prism_trt.data.masks import require_generation_prompt
from prism_trt.data.reading import read_records
from prism_trt.data.records import Conversation, Message
from prism_trt.data.turns import planned_prompts
from prism_trt.errors import PrismError
from prism_trt.manifest import sha256_file
from prism_trt.progress import track
from prism_trt.target.tokenizer import TRAINING_DATE, Tokenizer


class PromptConfig(StrictModel):
    """Which prompts of a data file the target is asked."""

    turns: int | None = Field(
        None,
        ge=1,
        description="ask the first so many turns of a conversation, each a prompt of its own  [default: the last]",
    )
    near_duplicates: float | None = Field(
        None, gt=0, le=1, description="leave out conversations this similar to an earlier one, for example 0.8"
    )
    exclude: list[Path] = Field([], description="leave out conversations that share 13 words in a row with this file")


@dataclass(frozen=True)
class PromptSet:
    """Prompts as the target sees them, chat template applied."""

    prompts: list[list[int]]
    too_long: int
    """Prompts dropped because they exceed the token limit."""
    duplicates: int
    """Prompts dropped because an earlier one renders to the same tokens."""
    refused: int
    """Prompts dropped because the chat template refused them, such as a system prompt for Gemma."""


def prepare_prompts(
    path: Path, tokenizer: Tokenizer, max_tokens: int, config: PromptConfig
) -> tuple[list[list[int]], DataReport]:
    """Read a data file, leave out what `config` says, and render the rest.

    Returns:
        Token ids of each prompt, in the order of the file, and what became of every record.

    Raises:
        PrismError: a file cannot be read or holds something else, the tokenizer's chat template cannot be used, or no
            prompt is left.
    """
    records = read_records(path)
    grams = evaluation_grams(
        turn.user
        for file in config.exclude
        for conversation in read_records(file).conversations
        for turn in conversation.turns
    )
    fresh = [c for c in records.conversations if not any(repeats_evaluation(turn.user, grams) for turn in c.turns)]
    distinct = fresh if config.near_duplicates is None else _distinct(fresh, config.near_duplicates)
    if not distinct:
        raise PrismError(f"every conversation of {path} shares text with an excluded file: pass another --exclude")
    asked = [messages for conversation in distinct for messages in planned_prompts(conversation, config.turns)]
    prompts = tokenize_prompts(track(asked, "tokenizing"), tokenizer, max_tokens)
    report = DataReport(
        file=str(path),
        sha256=sha256_file(Path(path)),
        records=records.count,
        formats=dict(records.formats),
        thinking_removed=records.thinking_removed,
        skipped=records.skipped,
        excluded=len(records.conversations) - len(fresh),
        near_duplicates=len(fresh) - len(distinct),
        conversations=len(distinct),
        asked=len(asked),
        refused=prompts.refused,
        too_long=prompts.too_long,
        duplicates=prompts.duplicates,
        prompts=len(prompts.prompts),
    )
    return prompts.prompts, report


def tokenize_prompts(conversations: Iterable[Sequence[Message]], tokenizer: Tokenizer, max_tokens: int) -> PromptSet:
    """Render conversations with the chat template and its generation prompt; drop long ones and repetitions.

    A template that prints the date prints `TRAINING_DATE`, so that the same file gives the same prompts on every day.

    Raises:
        PrismError: no prompt is left, or the tokenizer has no chat template or one without the generation prompt that
            it needs.
    """
    tokenizer = tokenizer.dated(TRAINING_DATE)
    require_generation_prompt(tokenizer)
    kept: dict[tuple[int, ...], None] = {}
    too_long = duplicates = 0
    refusals: list[PrismError] = []
    for messages in conversations:
        try:
            ids = tuple(tokenizer.encode_chat(messages, add_generation_prompt=True))
        except PrismError as error:
            refusals.append(error)
            continue
        if len(ids) > max_tokens:
            too_long += 1
        elif ids in kept:
            duplicates += 1
        else:
            kept[ids] = None
    if not kept and not too_long and refusals:
        raise refusals[0]
    if not kept:
        raise PrismError(f"none of the {too_long} prompts has {max_tokens} tokens or fewer: raise --max-prompt-tokens")
    return PromptSet([list(ids) for ids in kept], too_long, duplicates, len(refusals))


def _distinct(conversations: list[Conversation], similarity: float) -> list[Conversation]:
    texts = ("\n".join(turn.user for turn in conversation.turns) for conversation in conversations)
    repeated = track(near_duplicates(texts, similarity), "looking for repetitions", len(conversations))
    return [conversation for conversation, skip in zip(conversations, repeated, strict=True) if not skip]
