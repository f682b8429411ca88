"""Measure an engine with and without drafts in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prism_trt.bench.methods import load_methods, read_methods
from prism_trt.bench.prompts import PROMPTS
from prism_trt.bench.questions import Question
from prism_trt.bench.results import BenchResult, BenchSettings
from prism_trt.bench.runner import run_bench
from prism_trt.engines.loading import load_engine_tokenizer

MAX_TOKENS = 96


def own_questions() -> list[Question]:
    """The bench's own prompts as one question set."""
    return [Question("quickstart", number, "", (text,)) for number, text in enumerate(PROMPTS, start=1)]


def measure(engine: Path, threads: int | None, on_question: Callable[[], None] = lambda: None) -> BenchResult:
    """Answer the own prompts greedily with plain decoding and with the engine's default tree, interleaved.

    Raises:
        PrismError: as `read_methods`, `load_engine` and `run_bench`.
    """
    (method,) = load_methods(read_methods([f"prism={engine}"]), threads)
    settings = BenchSettings(trees=(method.engines[0].default_tree,), max_new_tokens=MAX_TOKENS)
    tokenizer = load_engine_tokenizer(engine)
    return run_bench([method], tokenizer, own_questions(), settings, on_question=lambda index, record: on_question())
