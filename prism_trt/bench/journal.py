"""Questions finished so far, kept beside the result so that an interrupted run continues."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from prism_trt.bench.questions import Question
from prism_trt.bench.results import BenchSettings, Environment, MethodInfo, QuestionRecord
from prism_trt.config import StrictModel
from prism_trt.errors import PrismError
from prism_trt.manifest import sha256_json
from prism_trt.storage import writing


class JournalHead(StrictModel):
    """First line of a journal: the run it belongs to."""

    kind: Literal["bench-journal"] = "bench-journal"
    settings: BenchSettings
    methods: tuple[MethodInfo, ...]
    environment: Environment
    questions_sha256: str


class JournalEntry(StrictModel):
    """Every further line: a finished question."""

    index: int
    """Place of the question in the run."""
    record: QuestionRecord


def journal_path(result: Path) -> Path:
    """Where the journal of a run that will write `result` is kept."""
    return result.with_name(f"{result.name}.partial")


def journal_head(
    settings: BenchSettings, methods: Sequence[MethodInfo], environment: Environment, questions: Sequence[Question]
) -> JournalHead:
    """What must not change between the parts of a run."""
    asked = [[question.set_name, question.question_id, list(question.turns)] for question in questions]
    return JournalHead(
        settings=settings, methods=tuple(methods), environment=environment, questions_sha256=sha256_json(asked)
    )


class Journal:
    """A file of JSON lines; a line that was cut off is dropped when the file is opened again."""

    def __init__(self, path: Path, head: JournalHead) -> None:
        """Read the journal `path`, when there is one.

        Raises:
            PrismError: it belongs to another run, or is damaged.
        """
        self._path = path
        self._head = head
        self.finished: dict[int, QuestionRecord] = {}
        if not path.exists():
            return
        first, *others = path.read_bytes().split(b"\n")[:-1] or [b""]
        if first:
            self.finished = _entries(path, first, others, head)
        os.truncate(path, sum(len(line) + 1 for line in (first, *others)) if others else 0)

    def add(self, index: int, record: QuestionRecord | None) -> None:
        """Append a finished question; nothing is kept of one that was skipped (None)."""
        if record is None:
            return
        lines = [] if self.finished else [self._head.model_dump_json()]
        lines.append(JournalEntry(index=index, record=record).model_dump_json())
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        self.finished[index] = record

    def remove(self) -> None:
        """Delete the file, once the result is written."""
        self._path.unlink(missing_ok=True)


def _entries(path: Path, first: bytes, others: Sequence[bytes], head: JournalHead) -> dict[int, QuestionRecord]:
    try:
        found = JournalHead.model_validate_json(first)
        entries = [JournalEntry.model_validate_json(line) for line in others]
    except ValidationError:
        raise PrismError(f"{path} is damaged: delete it to start the run afresh") from None
    if found != head:
        raise PrismError(
            f"{path} belongs to an unfinished run with other settings, engines, questions or versions: "
            "repeat that run's command, choose another --json, or delete the file"
        )
    return {entry.index: entry.record for entry in entries}
