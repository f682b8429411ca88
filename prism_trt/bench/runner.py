"""Answer every question with every method: one at a time and interleaved for speed, or in batches for acceptance."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

import prism_trt
from prism_trt.bench.bandwidth import BandwidthProbe
from prism_trt.bench.methods import Method
from prism_trt.bench.questions import Question
from prism_trt.bench.replay import KnownAnswer, ReplayEngine, known_answers
from prism_trt.bench.results import (
    VANILLA,
    Bandwidth,
    BenchResult,
    BenchSettings,
    Environment,
    GenerationRecord,
    QuestionRecord,
)
from prism_trt.bench.summary import all_identical, summarise
from prism_trt.config import TreeShape
from prism_trt.engines.loading import default_threads
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Request, Result, generate
from prism_trt.speculative.sampling import SamplingParams
from prism_trt.target.tokenizer import Tokenizer

_WARM_UP_TOKENS = 16
# Questions that share a batch, in batches: more keep it full for longer, fewer are lost by an interruption.
_BATCHES_PER_GROUP = 4


AnyMode = TypeVar("AnyMode")


@dataclass(frozen=True)
class Mode:
    """One way to answer: plainly, or with one tree and the drafter of one training seed."""

    method: str
    training_seed: int
    tree: TreeShape | None
    engine: Engine


def run_bench(
    methods: Sequence[Method],
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    settings: BenchSettings,
    finished: Mapping[int, QuestionRecord] | None = None,
    on_question: Callable[[int, QuestionRecord | None], None] = lambda index, record: None,
    on_answers: Callable[[int], None] = lambda count: None,
) -> BenchResult:
    """Answer `questions` with plain decoding and with every method, tree and temperature.

    With ``settings.batch`` 1 the modes take turns question by question in rotating order, so that drift of a shared
    machine hits all of them alike. In larger batches, and in a replay, nothing is timed.

    Args:
        finished: records of questions answered earlier, by index; they are taken over.
        on_question: called with the index and record of each further question, None for one that does not fit.
        on_answers: called with the number of answers made (or left out) since the last call; they sum to
            `count_answers` of the questions not in `finished`.

    Raises:
        PrismError: the reference is not among the drafting methods, a temperature cannot be replayed, or no question
            fits the context.
    """
    drafting = [method.name for method in methods if method.name != VANILLA]
    if settings.reference is not None and settings.reference not in drafting:
        raise PrismError(
            f"the reference {settings.reference} is not among the drafting methods: name one of {', '.join(drafting)}"
        )
    if settings.replay and any(settings.temperatures):
        raise PrismError("only greedy answers can be replayed: leave out --temperature or --replay")
    run = _Run(modes_of(methods, settings.trees), tokenizer, settings, on_answers)
    records: dict[int, QuestionRecord | None] = dict(finished or {})
    if settings.timed:
        run.warm_up()
    size = 1 if settings.batch == 1 else _BATCHES_PER_GROUP * settings.batch
    left = [index for index in range(len(questions)) if index not in records]
    for first in range(0, len(left), size):
        group = left[first : first + size]
        for index, record in zip(group, run.answer_group(group[0], [questions[i] for i in group]), strict=True):
            records[index] = record
            on_question(index, record)
    answered = [record for index in range(len(questions)) if (record := records[index]) is not None]
    skipped: dict[str, int] = {}
    for index, question in enumerate(questions):
        if records[index] is None:
            skipped[question.set_name] = skipped.get(question.set_name, 0) + 1
    if not answered:
        raise PrismError(
            f"none of the {len(questions)} prompts fits the context of {run.context} tokens together with "
            f"{settings.max_new_tokens} new ones: lower --max-new-tokens or build the engine with a larger context"
        )
    infos = tuple(method.info for method in methods)
    return BenchResult(
        settings=settings,
        methods=infos,
        environment=environment(),
        bandwidth_gb_s=summarise_bandwidth([record.bandwidth_gb_s for record in answered]),
        identical=all_identical(entry.identical for record in answered for entry in record.generations),
        summaries=summarise(answered, skipped, settings, infos),
        questions=tuple(answered),
    )


def modes_of(methods: Sequence[Method], trees: Sequence[TreeShape]) -> list[Mode]:
    """Vanilla, on the engine of that name or else the first, then every training seed of every method in every tree."""
    plain = next((method for method in methods if method.name == VANILLA), methods[0])
    return [Mode(VANILLA, 0, None, plain.engines[0])] + [
        Mode(method.name, number, tree, engine)
        for method in methods
        if method.name != VANILLA
        for number, engine in enumerate(method.engines)
        for tree in trees
    ]


def count_answers(methods: Sequence[Method], questions: Sequence[Question], settings: BenchSettings) -> int:
    """Answers that `run_bench` makes when every turn fits."""
    return _count_answers(modes_of(methods, settings.trees), questions, settings)


def in_turn(modes: Sequence[AnyMode], number: int) -> list[AnyMode]:
    """Order of `modes` the `number`-th time: rotated by one each time, and reversed in every other rotation."""
    shift = number % len(modes)
    rotated = [*modes[shift:], *modes[:shift]]
    return rotated if number // len(modes) % 2 == 0 else rotated[::-1]


def summarise_bandwidth(rates: Sequence[float]) -> Bandwidth:
    """Median and range of measured GB/s."""
    return Bandwidth(median=statistics.median(rates), low=min(rates), high=max(rates), threads=default_threads())


def environment() -> Environment:
    """Versions and the processor of this process."""
    return Environment(
        prism_trt=prism_trt.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        processor=_processor(),
    )


class _Run:
    """Answers questions in every mode."""

    def __init__(
        self, modes: Sequence[Mode], tokenizer: Tokenizer, settings: BenchSettings, on_answers: Callable[[int], None]
    ) -> None:
        self.context = min(mode.engine.limits.context for mode in modes)
        self._modes = modes
        self._tokenizer = tokenizer
        self._settings = settings
        self._on_answers = on_answers
        self._probe = BandwidthProbe()

    def warm_up(self) -> None:
        """Make every mode decode a little, so that no first question pays for it."""
        prompt = self._tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
        if len(prompt) + _WARM_UP_TOKENS <= self.context:
            for mode in self._modes:
                for temperature in self._settings.temperatures:
                    sampling = SamplingParams(temperature=temperature)
                    generate(mode.engine, [Request(prompt, _WARM_UP_TOKENS, sampling, tree=mode.tree)])

    def answer_group(self, number: int, questions: Sequence[Question]) -> list[QuestionRecord | None]:
        """Answer `questions` at the same time; None for those whose first turn does not fit.

        `number` decides the order of the modes.
        """
        settings = self._settings
        bandwidth = self._probe.measure()
        generations: list[list[GenerationRecord]] = [[] for _ in questions]
        for temperature in settings.temperatures:
            self._converse(number, questions, temperature, generations)
        records: list[QuestionRecord | None] = []
        for question, entries in zip(questions, generations, strict=True):
            left_out = _count_answers(self._modes, [question], settings) - len(entries)
            if left_out:
                self._on_answers(left_out)
            if not entries:
                records.append(None)
                continue
            records.append(
                QuestionRecord(
                    set=question.set_name,
                    question_id=question.question_id,
                    category=question.category,
                    turns=1 + max(entry.turn for entry in entries),
                    bandwidth_gb_s=bandwidth,
                    generations=tuple(entries),
                )
            )
        return records

    def _converse(
        self,
        number: int,
        questions: Sequence[Question],
        temperature: float,
        generations: Sequence[list[GenerationRecord]],
    ) -> None:
        """Append the answers to all turns of `questions` to `generations`.

        Vanilla's first answer is in the context of the next turn, so that all modes get the same prompts.
        """
        settings, tokenizer = self._settings, self._tokenizer
        conversations: dict[int, list[dict[str, str]]] = {index: [] for index in range(len(questions))}
        for turn in range(max(len(question.turns) for question in questions)):
            prompts: dict[int, list[int]] = {}
            for index, messages in conversations.items():
                if turn < len(questions[index].turns):
                    messages.append({"role": "user", "content": questions[index].turns[turn]})
                    prompt = tokenizer.encode_chat(messages)
                    if len(prompt) + settings.max_new_tokens <= self.context:
                        prompts[index] = prompt
            if not prompts:
                return
            known = self._known_answers(list(prompts.values())) if settings.replay else {}
            answers = [
                (mode, repeat, *self._answer(mode, list(prompts.values()), temperature, repeat, known))
                for repeat in range(settings.repeats)
                for mode in in_turn(self._modes, number + turn + repeat)
            ]
            references = next(results for mode, repeat, results, _ in answers if (mode.tree, repeat) == (None, 0))
            for mode, repeat, results, seconds in answers:
                for index, result, reference in zip(prompts, results, references, strict=True):
                    compared = not temperature and not self._replays(mode)
                    identical = result.tokens == reference.tokens if compared else None
                    generations[index].append(
                        _record(mode, turn, repeat, temperature, len(prompts[index]), result, seconds, identical)
                    )
            conversations = {index: conversations[index] for index in prompts}
            for index, reference in zip(prompts, references, strict=True):
                answer = tokenizer.decode(_without_eos(reference.tokens, tokenizer))
                conversations[index].append({"role": "assistant", "content": answer})

    def _replays(self, mode: Mode) -> bool:
        """Whether the answers of `mode` are not verified; plain decoding always runs."""
        return self._settings.replay and mode.tree is not None

    def _known_answers(self, prompts: Sequence[list[int]]) -> dict[object, list[KnownAnswer]]:
        """The target's answers by the states it gives as features, as far as a last round may look ahead."""
        tokens = self._settings.max_new_tokens + max(tree.depth for tree in self._settings.trees)
        engines = {_features_of(mode.engine): mode.engine for mode in self._modes if self._replays(mode)}
        return {fed: known_answers(engine, prompts, tokens) for fed, engine in engines.items()}

    def _answer(
        self,
        mode: Mode,
        prompts: Sequence[list[int]],
        temperature: float,
        repeat: int,
        known: Mapping[object, list[KnownAnswer]],
    ) -> tuple[list[Result], float | None]:
        """Answers to `prompts` and, when they are timed, their wall time."""
        requests = [
            Request(
                prompt=prompt,
                max_tokens=self._settings.max_new_tokens,
                sampling=SamplingParams(temperature=temperature, seed=self._settings.seed + repeat),
                eos_token_ids=tuple(self._tokenizer.eos_token_ids),
                tree=mode.tree,
            )
            for prompt in prompts
        ]
        engine = mode.engine
        if self._replays(mode):
            engine = ReplayEngine(engine, known[_features_of(engine)])
        start = time.perf_counter()
        results = generate(engine, requests)
        seconds = time.perf_counter() - start
        self._on_answers(len(results))
        return results, seconds if self._settings.timed else None


def _record(
    mode: Mode,
    turn: int,
    repeat: int,
    temperature: float,
    prompt_tokens: int,
    result: Result,
    seconds: float | None,
    identical: bool | None,
) -> GenerationRecord:
    counts = result.statistics
    return GenerationRecord(
        method=mode.method,
        training_seed=mode.training_seed,
        tree=None if mode.tree is None else str(mode.tree),
        temperature=temperature,
        turn=turn,
        repeat=repeat,
        prompt_tokens=prompt_tokens,
        output_tokens=counts.num_output_tokens,
        decode_tokens=counts.num_output_tokens - 1,
        target_passes=counts.target_passes,
        drafted=counts.drafted,
        accepted=counts.accepted,
        accepted_counts=tuple(counts.accepted_counts),
        prefill_seconds=None if seconds is None else counts.prefill_seconds,
        decode_seconds=None if seconds is None else counts.decode_seconds,
        total_seconds=seconds,
        finish_reason=str(result.finish_reason),
        identical=identical,
    )


def _features_of(engine: Engine) -> object:
    """What engines whose features are the same share."""
    return getattr(engine, "feature_layers", None) or id(engine)


def _count_answers(modes: Sequence[Mode], questions: Sequence[Question], settings: BenchSettings) -> int:
    turns = sum(len(question.turns) for question in questions)
    return turns * len(modes) * len(settings.temperatures) * settings.repeats


def _without_eos(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in tokenizer.eos_token_ids else tokens


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
