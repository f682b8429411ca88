"""Show a file of training records as the target will see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prism_trt.data.masks import mask_answers, require_generation_prompt
from prism_trt.data.reading import Records, read_records
from prism_trt.data.records import Conversation, Message
from prism_trt.data.turns import planned_prompts
from prism_trt.errors import PrismError
from prism_trt.progress import track
from prism_trt.target.config import TargetConfig
from prism_trt.target.tokenizer import TRAINING_DATE, Tokenizer, load_hf_tokenizer

LOSS, SPECIAL = "bold green", "cyan"
_QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind."""

    text: str
    loss: bool
    special: bool


@dataclass(frozen=True)
class Sample:
    """A prompt the target is asked, followed by the data set's answer if there is one."""

    tokens: int
    loss_tokens: int
    """Tokens of the answer; 0 when the data set has none."""
    pieces: list[Piece]


@dataclass(frozen=True)
class DataView:
    """What `inspect --data` shows."""

    file: Path
    records: Records
    lengths: dict[str, np.ndarray]
    """Tokens of each prompt and each answer by what they are; empty without a tokenizer."""
    samples: list[Sample | str]
    """The first records; a string says why one cannot be rendered."""


def load_tokenizer(target: Path) -> Tokenizer:
    """The tokenizer of a target; of a Hugging Face directory without reading its weights.

    Raises:
        PrismError: there is none, or it is damaged.
    """
    config = target / "config.json"
    if not config.is_file():
        from prism_trt.target.loading import load_target  # imports torch, which takes seconds

        return load_target(target).tokenizer
    try:
        values = json.loads(config.read_text())
    except ValueError as error:
        raise PrismError(f"{config} is not valid JSON: {error}") from None
    return load_hf_tokenizer(target, TargetConfig.from_hf(values, str(config)).eos_token_ids)


def view_data(path: Path, target: Path | None, count: int) -> DataView:
    """Read `path` and, with a target, render its first `count` usable records and measure all of them.

    Raises:
        PrismError: the file or the target cannot be read, or the target's chat template cannot be used.
    """
    records = read_records(path)
    if target is None:
        return DataView(path, records, {}, [])
    tokenizer = load_tokenizer(target).dated(TRAINING_DATE)
    require_generation_prompt(tokenizer)
    prompts, answers = [], []
    for conversation in track(records.conversations, "tokenizing"):
        messages, answer = _asked(conversation)
        try:
            prompts.append(len(tokenizer.encode_chat(messages)))
        except PrismError:
            continue  # counted by the difference to the number of conversations
        if answer is not None:
            answers.append(len(tokenizer.encode(answer, add_special_tokens=False)))
    lengths = {"prompt": np.array(prompts), "answer in the file": np.array(answers)}
    samples = [_sample(conversation, tokenizer) for conversation in records.conversations[:count]]
    return DataView(path, records, lengths, samples)


def to_json(view: DataView) -> str:
    """Everything but the samples, as indented JSON."""
    values: dict[str, Any] = {
        "file": str(view.file),
        "records": view.records.count,
        "usable": len(view.records.conversations),
        "formats": dict(view.records.formats),
        "thinking_removed": view.records.thinking_removed,
        "skipped": {reason: skipped.model_dump() for reason, skipped in view.records.skipped.items()},
        "tokens": {what: _summary(lengths) for what, lengths in view.lengths.items()},
    }
    return json.dumps(values, indent=2)


def show(view: DataView, console: Console) -> None:
    """Print tables of counts and lengths, then the samples."""
    for table in _tables(view):
        console.print(table)
    for number, sample in enumerate(view.samples, start=1):
        if isinstance(sample, str):
            console.rule(f"usable record {number}", align="left")
            console.print(Text(sample, style="red"))
            continue
        title = f"usable record {number}: {sample.tokens} tokens, {sample.loss_tokens} of them with loss"
        console.rule(title, align="left")
        console.print(_coloured(sample, marks=console.color_system is None))


def _asked(conversation: Conversation) -> tuple[list[Message], str | None]:
    """The prompt the target is asked by default, and the data set's answer to it."""
    (messages,) = planned_prompts(conversation)
    turn = sum(message["role"] == "user" for message in messages) - 1
    return messages, conversation.turns[turn].answer


def _sample(conversation: Conversation, tokenizer: Tokenizer) -> Sample | str:
    messages, answer = _asked(conversation)
    try:
        if answer is None:
            tokens, loss = tokenizer.encode_chat(messages), range(0)
        else:
            masked = mask_answers([*messages, {"role": "assistant", "content": answer}], tokenizer)
            tokens, loss = masked.tokens, masked.answers[-1]
    except PrismError as error:
        return str(error)
    return Sample(len(tokens), len(loss), list(_pieces(tokens, loss, tokenizer)))


def _pieces(tokens: list[int], loss: range, tokenizer: Tokenizer) -> Iterator[Piece]:
    def kind(position: int) -> tuple[bool, bool]:
        special = tokenizer.decode([tokens[position]]) == "" != tokenizer.decode([tokens[position]], False)
        return position in loss, special

    shown = ""
    for (carries_loss, special), positions in groupby(range(len(tokens)), kind):
        # Decoded from the start, because some tokenizers drop the space in front of the first token.
        *_, last = positions
        text = tokenizer.decode(tokens[: last + 1], skip_special_tokens=False)
        yield Piece(text[len(shown) :], carries_loss, special)
        shown = text


def _coloured(sample: Sample, marks: bool) -> Text:
    """The sample's text, line ends visible; `marks` puts brackets around what carries a loss."""
    text = Text()
    for loss, pieces in groupby(sample.pieces, lambda piece: piece.loss):
        text.append("[[" if loss and marks else "")
        for piece in pieces:
            style = f"{LOSS if loss else ''} {SPECIAL if piece.special else ''}".strip()
            text.append(piece.text.replace("\n", "↵\n"), style)
        text.append("]]" if loss and marks else "")
    if not sample.loss_tokens:
        text.append("(here the target answers)", f"{LOSS} italic")
    return text


def _tables(view: DataView) -> Iterator[Table]:
    records = view.records
    usable = len(records.conversations)
    counts = Table("", "records", "first", title=f"{escape(str(view.file))}: {records.count} records, {usable} usable")
    for name, count in records.formats.items():
        counts.add_row(f"with {name}", str(count))
    if records.thinking_removed:
        counts.add_row("thinking removed", str(records.thinking_removed))
    for reason, skipped in records.skipped.items():
        counts.add_row(f"skipped: {reason}", str(skipped.records), skipped.first, style="yellow")
    if view.lengths and (refused := usable - len(view.lengths["prompt"])):
        counts.add_row("refused by the chat template", str(refused), style="yellow")
    yield counts
    measured = {what: _summary(lengths) for what, lengths in view.lengths.items() if len(lengths)}
    if measured:
        table = Table("tokens", "number", *_QUANTILES)
        for what, summary in measured.items():
            table.add_row(what, *map(str, summary.values()))
        yield table


def _summary(lengths: np.ndarray) -> dict[str, int]:
    """Number of lengths and their quantiles."""
    if not len(lengths):
        return {"number": 0}
    values = np.quantile(lengths, list(_QUANTILES.values()), method="higher")
    return {"number": len(lengths), **{name: int(value) for name, value in zip(_QUANTILES, values, strict=True)}}
