"""The bench's JSON: raw counts per generation, and the figures computed from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from prism_trt.config import StrictModel, TreeShape
from prism_trt.manifest import atomic_file

VANILLA = "vanilla"
OVERALL = "overall"


class BenchSettings(StrictModel):
    """What is run."""

    trees: tuple[TreeShape, ...] = Field(min_length=1)
    temperatures: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field((0.0,), min_length=1)
    max_new_tokens: int = Field(128, ge=2)
    batch: int = Field(1, ge=1, description="questions answered at a time; times are measured only when it is 1")
    replay: bool = Field(
        False, description="drafts follow vanilla's answers without verification passes; only acceptance is measured"
    )
    seed: int = Field(0, ge=0, lt=2**62, description="seed of the samplers and of the bootstrap")
    repeats: int = Field(1, ge=1, description="answers per question; a sampler's seed grows by 1 with each")
    reference: str | None = Field(None, description="method that the others are compared with")
    bootstrap_samples: int = Field(2000, ge=1)

    @property
    def timed(self) -> bool:
        """Whether times are measured."""
        return self.batch == 1 and not self.replay


class EngineInfo(StrictModel):
    """Which engine was measured."""

    profile: str
    runtime: str
    dtype: str
    isa: str | None
    target_fingerprint: str
    drafter_sha256: str | None
    threads: int


class MethodInfo(StrictModel):
    """A method and its engines, one per training seed."""

    name: str
    engines: tuple[EngineInfo, ...] = Field(min_length=1)


class GenerationRecord(StrictModel):
    """One answer."""

    method: str = Field(description="'vanilla' without drafts")
    training_seed: int = Field(description="index of the engine among those of its method")
    tree: str | None = Field(description="SIZE/WIDTH/DEPTH; None for vanilla")
    temperature: float
    turn: int
    repeat: int
    prompt_tokens: int
    output_tokens: int
    decode_tokens: int = Field(description="output tokens after the first, which belongs to the prefill")
    target_passes: int = Field(description="target passes after the prefill")
    drafted: int = Field(description="draft tokens verified")
    accepted: int = Field(description="draft tokens accepted")
    accepted_counts: tuple[int, ...] = Field(description="entry a: passes that accepted exactly a draft tokens")
    prefill_seconds: float | None = Field(description="this and the other times: None in a batch")
    decode_seconds: float | None
    total_seconds: float | None
    finish_reason: str
    identical: bool | None = Field(
        description="the tokens are those of vanilla's first answer; None when sampling or replayed"
    )


class QuestionRecord(StrictModel):
    """All generations of one question."""

    set: str
    question_id: int | str
    category: str
    turns: int = Field(description="turns run; later ones are left out when the context is full")
    bandwidth_gb_s: float
    generations: tuple[GenerationRecord, ...]


class Interval(StrictModel):
    """A 95 % bootstrap confidence interval."""

    low: float
    high: float


class Estimate(Interval):
    """A figure with its 95 % bootstrap confidence interval over questions and, where there are several, seeds."""

    value: float


class Rates(StrictModel):
    """Throughput in tokens per second; None where it was not measured."""

    decode_tps: float | None = Field(description="pooled, without prefill")
    end_to_end_tps: float | None = Field(description="pooled, prefill included")


class Figures(StrictModel):
    """What one or several training seeds of a method did; None where nothing was measured."""

    rates: Rates
    speedup: Estimate | None = Field(description="ratio of pooled decode tokens per second to vanilla's")
    end_to_end_speedup: Estimate | None
    al_pooled: Estimate | None = Field(description="committed tokens / target passes over all questions")
    al_question_mean: Estimate | None = Field(description="mean over questions of tokens / passes of each")
    al_set_mean: Estimate | None = Field(description="mean over question sets of the pooled figure of each")
    step_acceptance: tuple[float | None, ...] = Field(description="per draft step, of the rounds that reached it")
    identical: bool | None


class Comparison(StrictModel):
    """Ratios of a method's figures to those of the reference method on the same questions."""

    al_pooled: Estimate | None
    al_set_mean: Estimate | None
    decode_tps: Estimate | None


class Summary(Figures):
    """Figures of one method on one question set, or on all of them ('overall'), pooled over training seeds."""

    set: str
    method: str
    tree: str
    temperature: float
    questions: int
    skipped: int = Field(description="questions whose prompt does not fit the context")
    vanilla: Rates
    training_seeds: tuple[Figures, ...] = Field(description="figures of each training seed; empty when there is one")
    to_reference: Comparison | None = Field(description="None without a reference, and for the reference itself")


class Bandwidth(StrictModel):
    """Memory bandwidth in GB/s over the run: one measurement beside each question."""

    median: float
    low: float
    high: float
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
    format: Literal[2] = 2
    settings: BenchSettings
    methods: tuple[MethodInfo, ...] = Field(description="vanilla runs on the engine of that name, else on the first")
    environment: Environment
    bandwidth_gb_s: Bandwidth
    identical: bool | None = Field(description="None when only sampling: two samplers need not draw alike")
    summaries: tuple[Summary, ...] = Field(description="per temperature and tree: each set, then 'overall', by method")
    questions: tuple[QuestionRecord, ...]

    @property
    def drafting(self) -> tuple[str, ...]:
        """Names of the methods that draft."""
        return tuple(method.name for method in self.methods if method.name != VANILLA)

    def overall(self, method: str, tree: TreeShape, temperature: float = 0.0) -> Summary:
        """The summary of `method` over all sets."""
        wanted = (OVERALL, method, str(tree), temperature)
        return next(
            entry for entry in self.summaries if (entry.set, entry.method, entry.tree, entry.temperature) == wanted
        )


def write_json(result: StrictModel, path: Path) -> None:
    """Write `result` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
