"""Measure an engine with and without drafts in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prism_trt.bench.app import default_tree, engine_info
from prism_trt.bench.prompts import PROMPTS
from prism_trt.bench.questions import Question
from prism_trt.bench.results import BenchResult, BenchSettings
from prism_trt.bench.runner import run_bench
from prism_trt.engines.loading import load_engine, load_engine_tokenizer

MAX_TOKENS = 96


def own_questions() -> list[Question]:
    """The bench's own prompts as one question set."""
    return [Question("quickstart", number, "", (text,)) for number, text in enumerate(PROMPTS, start=1)]


def measure(engine: Path, threads: int | None, on_question: Callable[[], None] = lambda: None) -> BenchResult:
    """Answer the own prompts greedily with plain decoding and with the engine's default tree, interleaved.

    Raises:
        PrismError: as `load_engine` and `run_bench`.
    """
    loaded = load_engine(engine, threads=threads)
    settings = BenchSettings(trees=(default_tree(loaded),), max_new_tokens=MAX_TOKENS)
    tokenizer, info = load_engine_tokenizer(engine), engine_info(engine, threads)
    return run_bench(loaded, tokenizer, own_questions(), settings, info, lambda record: on_question())
