"""The bench's JSON: raw counts per generation, and the figures computed from them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from prism_trt.config import StrictModel, TreeShape
from prism_trt.manifest import atomic_file

VANILLA = "vanilla"
OVERALL = "overall"


class BenchSettings(StrictModel):
    """What is run."""

    trees: tuple[TreeShape, ...] = Field(min_length=1)
    max_new_tokens: int = Field(128, ge=2)
    temperature: float = Field(0.0, ge=0.0)
    seed: int = Field(0, ge=0, description="seed of the samplers and of the bootstrap")
    repeats: int = Field(1, ge=1)
    bootstrap_samples: int = Field(2000, ge=1)


class GenerationRecord(StrictModel):
    """One answer in one mode."""

    mode: str = Field(description="'vanilla' or a tree SIZE/WIDTH/DEPTH")
    turn: int
    repeat: int
    prompt_tokens: int
    output_tokens: int
    decode_tokens: int = Field(description="output tokens after the first, which belongs to the prefill")
    target_passes: int = Field(description="target passes after the prefill")
    drafted: int = Field(description="draft tokens verified")
    accepted: int = Field(description="draft tokens accepted")
    accepted_counts: tuple[int, ...] = Field(description="entry a: passes that accepted exactly a draft tokens")
    prefill_seconds: float
    decode_seconds: float
    total_seconds: float
    finish_reason: str


class QuestionRecord(StrictModel):
    """All generations of one question."""

    set: str
    question_id: int | str
    category: str
    turns: int = Field(description="turns run; later ones are left out when the context is full")
    identical: bool | None = Field(description="every mode gave vanilla's tokens; None when sampling")
    bandwidth_gb_s: float
    generations: tuple[GenerationRecord, ...]


class Interval(StrictModel):
    """A 95 % bootstrap confidence interval over questions."""

    low: float
    high: float


class Rates(StrictModel):
    """Throughput of one mode in tokens per second."""

    decode_tps: float | None = Field(description="pooled, without prefill")
    end_to_end_tps: float | None = Field(description="pooled, prefill included")


class Summary(StrictModel):
    """Figures of one tree on one question set, or on all of them ('overall')."""

    set: str
    tree: str
    questions: int
    skipped: int = Field(description="questions whose prompt does not fit the context")
    vanilla: Rates
    prism: Rates
    speedup: float | None = Field(description="ratio of pooled decode tokens per second")
    speedup_interval: Interval | None
    end_to_end_speedup: float | None
    al_pooled: float | None = Field(description="committed tokens / target passes over all questions")
    al_pooled_interval: Interval | None
    al_question_mean: float | None
    al_question_mean_interval: Interval | None
    step_acceptance: tuple[float | None, ...] = Field(description="per draft step, of the rounds that reached it")
    identical: bool | None


class Bandwidth(StrictModel):
    """Memory bandwidth in GB/s over the run: one measurement beside each question."""

    median: float
    low: float
    high: float
    threads: int


class EngineInfo(StrictModel):
    """Which engine was measured."""

    profile: str
    runtime: str
    dtype: str
    isa: str | None
    target_fingerprint: str
    drafter_sha256: str | None
    threads: int


class Environment(StrictModel):
    """Where it was measured."""

    prism_trt: str
    torch: str
    python: str
    processor: str


class BenchResult(StrictModel):
    """Everything one bench run wrote down."""

    kind: Literal["bench"] = "bench"
    format: Literal[1] = 1
    settings: BenchSettings
    engine: EngineInfo
    environment: Environment
    bandwidth_gb_s: Bandwidth
    identical: bool | None = Field(description="None when sampling: two samplers need not draw alike")
    summaries: tuple[Summary, ...] = Field(description="per tree: each set, then 'overall'")
    questions: tuple[QuestionRecord, ...]

    def overall(self, tree: TreeShape) -> Summary:
        """The summary over all sets for `tree`."""
        return next(entry for entry in self.summaries if (entry.set, entry.tree) == (OVERALL, str(tree)))


def write_json(result: StrictModel, path: Path) -> None:
    """Write `result` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
