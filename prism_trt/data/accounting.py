"""What became of every training record, from the file to the prompts the target is asked."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from prism_trt.config import StrictModel
from prism_trt.manifest import atomic_file


class Skipped(StrictModel):
    """Records that were left out for one reason."""

    records: int
    first: str
    """Where the first of them is: ``line 17``, or ``record 17`` of a JSON array."""


class DataReport(StrictModel):
    """Counts of one data file; those of each step add up to what is left after the step before.

    ``records = sum(skipped) + excluded + near_duplicates + conversations``;
    ``asked = refused + too_long + duplicates + prompts``, where a conversation is asked once or, with several turns,
    once per turn.
    """

    file: str
    sha256: str
    records: int
    formats: dict[str, int] = Field(description="records by the key that holds their conversation")
    thinking_removed: int = Field(description="usable records with thinking in front of an answer")
    skipped: dict[str, Skipped] = Field(description="by reason")
    excluded: int = Field(description="conversations that share text with an excluded file")
    near_duplicates: int = Field(description="conversations much like an earlier one")
    conversations: int
    asked: int
    refused: int = Field(description="prompts refused by the chat template")
    too_long: int = Field(description="prompts of too many tokens")
    duplicates: int = Field(description="prompts of the same tokens as an earlier one")
    prompts: int

    def lines(self) -> list[str]:
        """The report in words; counts of nothing are left out."""
        formats = ", ".join(f"{count} {name}" for name, count in self.formats.items())
        thinking = f"; thinking removed from {self.thinking_removed}" if self.thinking_removed else ""
        lines = [f"{self.file}: {self.records} records ({formats}), {self.prompts} prompts{thinking}"]
        left_out = [
            f"{entry.records} skipped: {reason} (first: {entry.first})" for reason, entry in self.skipped.items()
        ]
        counts = {
            "with text of an excluded file": self.excluded,
            "much like an earlier one": self.near_duplicates,
            "refused by the chat template": self.refused,
            "too long": self.too_long,
            "repeated": self.duplicates,
        }
        left_out += [f"{count} {what}" for what, count in counts.items() if count]
        return lines + ([f"left out: {'; '.join(left_out)}"] if left_out else [])

    def save(self, path: Path) -> None:
        """Write the report as JSON, atomically."""
        with atomic_file(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=2) + "\n")
