"""Files of training records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_trt.data.accounting import Skipped
from prism_trt.data.records import FORMS, Conversation, UnusableRecord, parse_record, record_format
from prism_trt.errors import PrismError


@dataclass
class Records:
    """The usable conversations of a file, and what became of the other records."""

    conversations: list[Conversation] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    """Records by `record_format`, unusable ones included."""
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """By reason."""

    @property
    def count(self) -> int:
        """Records read."""
        return self.formats.total()

    @property
    def thinking_removed(self) -> int:
        """Conversations with thinking in front of an answer."""
        return sum(conversation.thinking_removed for conversation in self.conversations)


def read_records(path: Path) -> Records:
    """Read a file of JSON records, one per line or in one array; the format of each is known by its keys.

    A line that is no record of a known format ends the reading, because something is wrong with the file. A record
    that holds no usable conversation is left out and counted, because public data sets have many of those.

    Raises:
        PrismError: the file cannot be read or is empty, a line is not a record (by number), or none is usable.
    """
    path = Path(path)
    records = Records()
    for where, record in _values(path):
        try:
            records.formats[record_format(record)] += 1
            records.conversations.append(parse_record(record))
        except PrismError as error:
            raise PrismError(f"{path}, {where}: {error}") from None
        except UnusableRecord as error:
            reason = str(error)
            before = records.skipped.get(reason, Skipped(records=0, first=where))
            records.skipped[reason] = before.model_copy(update={"records": before.records + 1})
    if not records.count:
        raise PrismError(f"{path} holds no records: write one JSON object per line, {FORMS}")
    if not records.conversations:
        reason, skipped = next(iter(records.skipped.items()))
        raise PrismError(
            f"none of the {records.count} records of {path} is usable ({skipped.first}: {reason}): pass another file"
        )
    return records


def _values(path: Path) -> Iterator[tuple[str, object]]:
    """Each JSON value of the file and where it is."""
    try:
        if path.exists() and not path.is_file():
            raise PrismError(f"{path} is not a regular file, but data is read several times: pass the path of a file")
        with path.open(encoding="utf-8-sig") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if first.lstrip().startswith("["):
                yield from _array(path, file.read())
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"line {number}", _parse(path, f"line {number}", line)
    except OSError as error:
        raise PrismError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise PrismError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _array(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for number, value in enumerate(_parse(path, "JSON array", text), start=1):
        yield f"record {number}", value


def _parse(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PrismError(f"{path}, {where}: not valid JSON ({error}): correct it or remove it") from None
