"""Run every question in every mode, interleaved, so that drift of a shared machine hits all modes alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import prism_trt
from prism_trt.bench.bandwidth import BandwidthProbe
from prism_trt.bench.questions import Question
from prism_trt.bench.results import (
    VANILLA,
    Bandwidth,
    BenchResult,
    BenchSettings,
    EngineInfo,
    Environment,
    GenerationRecord,
    QuestionRecord,
)
from prism_trt.bench.summary import all_identical, summarise
from prism_trt.config import TreeShape
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Request, Result, generate
from prism_trt.speculative.sampling import SamplingParams
from prism_trt.target.tokenizer import Tokenizer

_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Generation:
    """One timed answer."""

    tokens: list[int]
    result: Result
    seconds: float


def run_bench(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    settings: BenchSettings,
    info: EngineInfo,
    on_question: Callable[[QuestionRecord | None], None] = lambda record: None,
) -> BenchResult:
    """Answer `questions` with plain decoding and with every tree of `settings`.

    `on_question` is called after each question, with None for one that was skipped because it does not fit.

    Raises:
        PrismError: the engine has no drafter, or no question fits its context.
    """
    if not engine.has_drafter:
        raise PrismError("this engine was built without a drafter, so there is nothing to compare: build it with one")
    probe = BandwidthProbe()
    _warm_up(engine, tokenizer, settings)
    records: list[QuestionRecord] = []
    skipped: dict[str, int] = {}
    for index, question in enumerate(questions):
        record = _run_question(engine, tokenizer, question, settings, probe, index)
        if record is None:
            skipped[question.set_name] = skipped.get(question.set_name, 0) + 1
        else:
            records.append(record)
        on_question(record)
    if not records:
        raise PrismError(
            f"none of the {len(questions)} prompts fits the context of {engine.limits.context} tokens together with "
            f"{settings.max_new_tokens} new ones: lower --max-new-tokens or build the engine with a larger context"
        )
    return BenchResult(
        settings=settings,
        engine=info,
        environment=environment(),
        bandwidth_gb_s=summarise_bandwidth([record.bandwidth_gb_s for record in records]),
        identical=all_identical(records),
        summaries=summarise(records, skipped, settings),
        questions=tuple(records),
    )


def summarise_bandwidth(rates: Sequence[float]) -> Bandwidth:
    """Median and range of measured GB/s."""
    return Bandwidth(median=statistics.median(rates), low=min(rates), high=max(rates), threads=torch.get_num_threads())


def environment() -> Environment:
    """Versions and the processor of this process."""
    return Environment(
        prism_trt=prism_trt.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        processor=_processor(),
    )


def answer(
    engine: Engine, prompt: list[int], tree: TreeShape | None, settings: BenchSettings, eos_token_ids: Sequence[int]
) -> Generation:
    """Answer one prompt alone on the engine and time it by the wall clock."""
    request = Request(
        prompt=prompt,
        max_tokens=settings.max_new_tokens,
        sampling=SamplingParams(temperature=settings.temperature, seed=settings.seed),
        stop_words=(),
        eos_token_ids=tuple(eos_token_ids),
        tree=tree,
    )
    start = time.perf_counter()
    (result,) = generate(engine, [request])
    return Generation(list(result.tokens), result, time.perf_counter() - start)


def _warm_up(engine: Engine, tokenizer: Tokenizer, settings: BenchSettings) -> None:
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
    short = settings.model_copy(update={"max_new_tokens": _WARM_UP_TOKENS})
    for mode in (None, *settings.trees):
        if _fits(engine, prompt, short):
            answer(engine, prompt, mode, short, tokenizer.eos_token_ids)


def _run_question(
    engine: Engine,
    tokenizer: Tokenizer,
    question: Question,
    settings: BenchSettings,
    probe: BandwidthProbe,
    index: int,
) -> QuestionRecord | None:
    modes: list[TreeShape | None] = [None, *settings.trees]
    messages: list[dict[str, str]] = []
    generations: list[GenerationRecord] = []
    identical = True
    bandwidth = probe.measure()
    for turn, text in enumerate(question.turns):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.encode_chat(messages)
        if not _fits(engine, prompt, settings):
            break
        reference: list[int] | None = None
        outputs: list[list[int]] = []
        for repeat in range(settings.repeats):
            forward = (index + turn + repeat) % 2 == 0
            for mode in modes if forward else reversed(modes):
                generation = answer(engine, prompt, mode, settings, tokenizer.eos_token_ids)
                generations.append(_record(generation, mode, turn, repeat, len(prompt)))
                outputs.append(generation.tokens)
                if mode is None and reference is None:
                    reference = generation.tokens
        assert reference is not None
        identical = identical and all(output == reference for output in outputs)
        messages.append({"role": "assistant", "content": tokenizer.decode(_without_eos(reference, tokenizer))})
    if not generations:
        return None
    return QuestionRecord(
        set=question.set_name,
        question_id=question.question_id,
        category=question.category,
        turns=1 + max(entry.turn for entry in generations),
        identical=identical if settings.temperature == 0 else None,
        bandwidth_gb_s=bandwidth,
        generations=tuple(generations),
    )


def _fits(engine: Engine, prompt: list[int], settings: BenchSettings) -> bool:
    return len(prompt) + settings.max_new_tokens <= engine.limits.context


def _without_eos(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in tokenizer.eos_token_ids else tokens


def _record(
    generation: Generation, mode: TreeShape | None, turn: int, repeat: int, prompt_tokens: int
) -> GenerationRecord:
    counts = generation.result.statistics
    return GenerationRecord(
        mode=VANILLA if mode is None else str(mode),
        turn=turn,
        repeat=repeat,
        prompt_tokens=prompt_tokens,
        output_tokens=counts.num_output_tokens,
        decode_tokens=counts.num_output_tokens - 1,
        target_passes=counts.target_passes,
        drafted=counts.drafted,
        accepted=counts.accepted,
        accepted_counts=tuple(counts.accepted_counts),
        prefill_seconds=counts.prefill_seconds,
        decode_seconds=counts.decode_seconds,
        total_seconds=generation.seconds,
        finish_reason=str(generation.result.finish_reason),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
