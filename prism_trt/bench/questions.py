"""Read questions in the `question.jsonl` format of the EAGLE evaluation sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prism_trt.errors import PrismError


class _Line(BaseModel):
    """One line of a question file; further keys (such as reference answers) are not read."""

    model_config = ConfigDict(extra="ignore", strict=True)

    question_id: int | str
    category: str = ""
    turns: list[str] = Field(min_length=1)


@dataclass(frozen=True)
class Question:
    """A conversation of one or more user turns; the answer to a turn is in the context of the next."""

    set_name: str
    question_id: int | str
    category: str
    turns: tuple[str, ...]


def set_name(path: Path) -> str:
    """Name of a question set: the parent directory of a file called `question.jsonl`, else the file's stem."""
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == "question.jsonl" else resolved.stem


def parse_questions(text: str, name: str, source: str) -> list[Question]:
    """Parse the lines of a question file, skipping empty ones.

    Raises:
        PrismError: a line is not a JSON object with `question_id` and a non-empty list `turns` of non-empty strings
            (the message names `source` and the line number), an id repeats, or there is no question.
    """
    questions: list[Question] = []
    seen: set[int | str] = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            parsed = _Line.model_validate(json.loads(line))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            reason = f"{key}: {first['msg']}" if key else first["msg"]
            raise PrismError(f"{source} line {number}: {reason}; correct the line or remove it") from None
        except ValueError as error:
            raise PrismError(f"{source} line {number} is not valid JSON ({error}): correct it or remove it") from None
        except RecursionError:
            raise PrismError(f"{source} line {number} is nested too deeply: correct it or remove it") from None
        if any("\ud800" <= character <= "\udfff" for turn in parsed.turns for character in turn):
            raise PrismError(f"{source} line {number} holds half a character (a lone surrogate): correct the text")
        if not all(turn.strip() for turn in parsed.turns):
            raise PrismError(f"{source} line {number} has an empty turn: write the user's message or remove the line")
        if parsed.question_id in seen:
            raise PrismError(f"{source} line {number} repeats question_id {parsed.question_id}: make the ids unique")
        seen.add(parsed.question_id)
        questions.append(Question(name, parsed.question_id, parsed.category, tuple(parsed.turns)))
    if not questions:
        raise PrismError(f"{source} holds no questions: pass a file with one JSON object per line")
    return questions


def load_questions(paths: Sequence[Path], per_set: int | None = None, skip_first: int = 0) -> list[Question]:
    """Read question files and keep `per_set` questions of each (None: all) after the first `skip_first`.

    Raises:
        PrismError: a file cannot be read or is malformed, two files have the same set name, or `skip_first` leaves
            nothing of a set.
    """
    questions: list[Question] = []
    origin: dict[str, Path] = {}
    for path in paths:
        name = set_name(path)
        if name in origin:
            raise PrismError(f"{path} and {origin[name]} are both set {name!r}: rename one of the files")
        origin[name] = path
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise PrismError(f"cannot read questions from {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise PrismError(f"{path} is not UTF-8 text: pass a question file in JSON lines") from None
        found = parse_questions(text, name, str(path))
        if skip_first >= len(found):
            raise PrismError(f"{path} holds {len(found)} questions, so skipping {skip_first} leaves none: skip fewer")
        end = None if per_set is None else skip_first + per_set
        questions += found[skip_first:end]
    return questions
