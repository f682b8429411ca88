"""Running questions, and the figures computed from what was counted."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from prism_trt.bench.app import app
from prism_trt.bench.methods import Method
from prism_trt.bench.questions import Question
from prism_trt.bench.results import BenchResult, BenchSettings, EngineInfo, GenerationRecord, QuestionRecord
from prism_trt.bench.runner import count_answers, in_turn, modes_of, run_bench
from prism_trt.bench.summary import summarise
from prism_trt.config import TreeShape
from prism_trt.engines.loading import make_engine
from prism_trt.engines.protocol import Engine, EngineLimits, TargetOutput, TokenBatch
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from tests.bench.engines import TREE, agreeing_models

OTHER = TreeShape(depth=2, width=2, size=4)
QUESTIONS = [
    Question("first", 1, "", ("Count to nine.", "And back to zero.")),
    Question("first", 2, "", ("The quick brown fox",)),
    Question("second", 1, "", ("over the lazy dog",)),
]
NOISES = {"prism": (0.0, 0.1), "hass": (0.2,)}
SETTINGS = BenchSettings(trees=(TREE, OTHER), max_new_tokens=16, repeats=2, reference="hass")
TOKENIZER = agreeing_models()[0].tokenizer


def engine(noise: float = 0.0, context: int = 256, kind: type[TorchEngine] = TorchEngine) -> Engine:
    target, drafter = agreeing_models(noise=noise)
    return kind(target, drafter, EngineLimits(2, context, 64), torch.device("cpu"), torch.float32)


def method(name: str, *engines: Engine) -> Method:
    info = EngineInfo(
        profile="cpu",
        runtime="torch",
        dtype="float32",
        isa=None,
        target_fingerprint="0",
        drafter_sha256=None,
        threads=1,
    )
    return Method(name, engines, (info,) * len(engines))


@pytest.fixture(scope="module")
def methods() -> list[Method]:
    """`prism` with two training seeds and `hass` with one, worse one."""
    return [method(name, *map(engine, noises)) for name, noises in NOISES.items()]


@pytest.fixture(scope="module")
def result(methods: list[Method]) -> BenchResult:
    return run_bench(methods, TOKENIZER, QUESTIONS, SETTINGS)


def generations(
    result: BenchResult, method: str, tree: TreeShape | None, set_name: str | None = None, seed: int | None = None
) -> list[tuple[QuestionRecord, GenerationRecord]]:
    return [
        (question, entry)
        for question in result.questions
        for entry in question.generations
        if (entry.method, entry.tree) == (method, tree and str(tree))
        and set_name in (None, question.set)
        and seed in (None, entry.training_seed)
    ]


def counts(questions: Iterable[QuestionRecord]) -> Counter[tuple[Any, ...]]:
    """Every answer without its times, whatever the order."""
    timeless = {"prefill_seconds", "decode_seconds", "total_seconds", "identical"}
    return Counter(
        (question.set, question.question_id, entry.model_dump_json(exclude=timeless))
        for question in questions
        for entry in question.generations
    )


def test_every_mode_answers_every_turn_and_repeat(result: BenchResult) -> None:
    expected = {("vanilla", 0, None)} | {
        (name, seed, str(tree))
        for name, noises in NOISES.items()
        for seed in range(len(noises))
        for tree in (TREE, OTHER)
    }
    for asked, question in zip(QUESTIONS, result.questions, strict=True):
        assert (question.set, question.question_id, question.turns) == (
            asked.set_name,
            asked.question_id,
            len(asked.turns),
        )
        runs = Counter(
            ((entry.method, entry.training_seed, entry.tree), entry.turn, entry.repeat)
            for entry in question.generations
        )
        assert runs == Counter((mode, t, r) for mode in expected for t in range(question.turns) for r in range(2))


def test_modes_take_turns(result: BenchResult, methods: list[Method]) -> None:
    modes = modes_of(methods, SETTINGS.trees)
    rounds = [in_turn(modes, number) for number in range(2 * len(modes))]
    for place in range(len(modes)):
        assert Counter(order[place] for order in rounds) == Counter({mode: 2 for mode in modes})
    following = Counter((a, b) for order in rounds for a, b in pairwise(order))
    assert all(following[a, b] == following[b, a] for a, b in following)
    for index, question in enumerate(result.questions):
        ran = [(entry.method, entry.training_seed, entry.tree) for entry in question.generations[: len(modes)]]
        assert ran == [(m.method, m.training_seed, m.tree and str(m.tree)) for m in in_turn(modes, index)]


def test_greedy_output_is_identical_and_vanilla_commits_one_token_per_pass(result: BenchResult) -> None:
    assert result.identical is True
    assert all(summary.identical is True for summary in result.summaries)
    for _, entry in generations(result, "vanilla", None):
        assert entry.target_passes == entry.decode_tokens == entry.output_tokens - 1
        assert entry.drafted == entry.accepted == 0


@pytest.mark.parametrize("tree", [TREE, OTHER])
@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("set_name", ["first", "second", None])
def test_figures_follow_from_the_raw_counts(
    result: BenchResult, tree: TreeShape, name: str, set_name: str | None
) -> None:
    def ratio(entries: list[tuple[QuestionRecord, GenerationRecord]], above: str, below: str) -> Any:
        return sum(getattr(e, above) for _, e in entries) / sum(getattr(e, below) for _, e in entries)

    wanted = (set_name or "overall", name, str(tree))
    summary = next(s for s in result.summaries if (s.set, s.method, s.tree) == wanted)
    plain = generations(result, "vanilla", None, set_name)
    reference = generations(result, "hass", tree, set_name)
    assert summary.vanilla.decode_tps == pytest.approx(ratio(plain, "decode_tokens", "decode_seconds"))
    seeds = range(len(NOISES[name]))
    assert len(summary.training_seeds) == (len(seeds) if len(seeds) > 1 else 0)
    for seed in (None, *seeds[: len(summary.training_seeds)]):
        figures = summary if seed is None else summary.training_seeds[seed]
        own = generations(result, name, tree, set_name, seed)
        assert len(own) == len(plain) * (len(seeds) if seed is None else 1)
        tps = ratio(own, "decode_tokens", "decode_seconds")
        assert figures.rates.decode_tps == pytest.approx(tps)
        assert figures.speedup is not None and figures.end_to_end_speedup is not None
        assert figures.speedup.value == pytest.approx(tps / summary.vanilla.decode_tps)
        ends = [ratio(entries, "output_tokens", "total_seconds") for entries in (own, plain)]
        assert figures.end_to_end_speedup.value == pytest.approx(ends[0] / ends[1])

        lengths: dict[tuple[str, object, int], list[tuple[QuestionRecord, GenerationRecord]]] = {}
        by_set: dict[str, list[tuple[QuestionRecord, GenerationRecord]]] = {}
        for question, entry in own:
            lengths.setdefault((question.set, question.question_id, entry.training_seed), []).append((question, entry))
            by_set.setdefault(question.set, []).append((question, entry))

        def length(entries: list[tuple[QuestionRecord, GenerationRecord]]) -> float:
            return sum(e.output_tokens - 1 for _, e in entries) / sum(e.target_passes for _, e in entries)

        assert figures.al_pooled is not None and figures.al_question_mean is not None and figures.al_set_mean
        assert figures.al_pooled.value == pytest.approx(length(own))
        assert figures.al_question_mean.value == pytest.approx(statistics.mean(map(length, lengths.values())))
        assert figures.al_set_mean.value == pytest.approx(statistics.mean(map(length, by_set.values())))

        accepted = [a for _, entry in own for a, n in enumerate(entry.accepted_counts) for _ in range(n)]
        assert sum(accepted) == sum(entry.accepted for _, entry in own)
        assert len(accepted) == sum(entry.target_passes for _, entry in own)
        assert len(figures.step_acceptance) == tree.depth
        for k, share in enumerate(figures.step_acceptance):
            reached = sum(a >= k for a in accepted)
            assert share == (pytest.approx(sum(a > k for a in accepted) / reached) if reached else None)

    if name == "hass":
        assert summary.to_reference is None
    else:
        own = generations(result, name, tree, set_name)
        compared = summary.to_reference
        assert compared is not None and compared.al_pooled is not None and compared.decode_tps is not None
        assert compared.al_pooled.value == pytest.approx(length(own) / length(reference))
        tps = [ratio(entries, "decode_tokens", "decode_seconds") for entries in (own, reference)]
        assert compared.decode_tps.value == pytest.approx(tps[0] / tps[1])


def test_the_drafters_differ_and_are_neither_always_nor_never_right(result: BenchResult) -> None:
    """Otherwise the tests of the arithmetic would say little."""
    prism, hass = (result.overall(name, TREE) for name in NOISES)
    shares = [figures.step_acceptance[0] for figures in (*prism.training_seeds, hass)]
    assert all(share is not None and 0.05 < share < 0.95 for share in shares)
    assert len(set(shares)) == 3


def test_intervals_hold_their_estimates(result: BenchResult) -> None:
    for summary in result.summaries:
        for estimate in (summary.speedup, summary.al_pooled, summary.al_question_mean, summary.al_set_mean):
            assert estimate is not None
            assert estimate.low <= estimate.value + 1e-9
            assert estimate.value <= estimate.high + 1e-9
    single = next(s for s in result.summaries if (s.set, s.method) == ("second", "hass")).al_pooled
    assert single is not None and single.low == single.high == pytest.approx(single.value)
    pair = next(s for s in result.summaries if (s.set, s.method) == ("second", "prism"))
    assert pair.al_pooled is not None
    assert [pair.al_pooled.low, pair.al_pooled.high] == pytest.approx(
        sorted(figures.al_pooled.value for figures in pair.training_seeds if figures.al_pooled)
    )


def test_json_reads_back_and_summaries_follow_from_it(result: BenchResult) -> None:
    read = BenchResult.model_validate_json(result.model_dump_json())
    assert read == result
    assert summarise(read.questions, {}, read.settings, read.methods) == result.summaries


def test_the_second_turn_sees_the_first_answer(result: BenchResult) -> None:
    entries = result.questions[0].generations
    (first,) = {entry.prompt_tokens for entry in entries if entry.turn == 0}
    (second,) = {entry.prompt_tokens for entry in entries if entry.turn == 1}
    assert second > first + entries[0].output_tokens // 2


def test_a_batch_counts_the_same_and_times_nothing(result: BenchResult, methods: list[Method]) -> None:
    together = run_bench(methods, TOKENIZER, QUESTIONS, SETTINGS.model_copy(update={"batch": 2}))
    assert counts(together.questions) == counts(result.questions)
    assert all(entry.decode_seconds is None for question in together.questions for entry in question.generations)
    for batched, single in zip(together.summaries, result.summaries, strict=True):
        assert (batched.al_pooled, batched.step_acceptance) == (single.al_pooled, single.step_acceptance)
        assert batched.speedup is batched.end_to_end_speedup is batched.rates.decode_tps is None
        assert batched.to_reference is None or batched.to_reference.decode_tps is None


def test_a_replay_counts_what_decoding_counts() -> None:
    limits = EngineLimits(2, 256, 64)
    compiled = [
        method(name, make_engine(*agreeing_models(noises[-1]), limits, threads=1)) for name, noises in NOISES.items()
    ]
    together = SETTINGS.model_copy(update={"batch": 2, "repeats": 1})
    decoded = run_bench(compiled, TOKENIZER, QUESTIONS, together)
    replayed = run_bench(compiled, TOKENIZER, QUESTIONS, together.model_copy(update={"replay": True}))
    assert counts(replayed.questions) == counts(decoded.questions)
    assert decoded.identical
    for some, others in zip(replayed.summaries, decoded.summaries, strict=True):
        assert (some.al_pooled, some.step_acceptance) == (others.al_pooled, others.step_acceptance)
        assert some.identical is None
    with pytest.raises(PrismError, match="only greedy answers can be replayed"):
        run_bench(compiled, TOKENIZER, QUESTIONS, together.model_copy(update={"replay": True, "temperatures": (1.0,)}))


def test_each_temperature_is_measured_on_its_own_and_sampling_is_not_compared(methods: list[Method]) -> None:
    settings = BenchSettings(trees=(OTHER,), max_new_tokens=12, temperatures=(0.0, 1.0))
    mixed = run_bench(methods[:1], TOKENIZER, QUESTIONS[:1], settings)
    greedy = run_bench(methods[:1], TOKENIZER, QUESTIONS[:1], settings.model_copy(update={"temperatures": (0.0,)}))
    cold, warm = (
        [entry for entry in mixed.questions[0].generations if entry.temperature == temperature]
        for temperature in (0, 1)
    )
    assert len(cold) == len(warm)
    whole = mixed.questions[0]
    assert counts([whole.model_copy(update={"generations": tuple(cold)})]) == counts(greedy.questions)
    assert mixed.identical is True
    assert all(entry.identical is None for entry in warm)
    assert mixed.overall("prism", OTHER, 0.0).identical is True
    assert mixed.overall("prism", OTHER, 1.0).identical is None
    assert mixed.overall("prism", OTHER, 0.0).al_pooled == greedy.overall("prism", OTHER).al_pooled


def test_a_finished_question_is_not_asked_again(result: BenchResult, methods: list[Method]) -> None:
    finished = dict(enumerate(result.questions[:2]))
    added: list[int] = []
    answers: list[int] = []
    continued = run_bench(
        methods, TOKENIZER, QUESTIONS, SETTINGS, finished, lambda i, record: added.append(i), answers.append
    )
    assert added == [2]
    assert sum(answers) == count_answers(methods, QUESTIONS[2:], SETTINGS)
    assert continued.questions[:2] == result.questions[:2]
    assert counts(continued.questions) == counts(result.questions)


def test_prompts_that_do_not_fit_are_skipped_and_counted() -> None:
    small = [method("prism", engine(context=64)), method("hass", engine(0.2))]
    long = Question("first", 9, "", ("long " * 60,))
    later = Question("first", 8, "", ("a", "long " * 60))
    settings = BenchSettings(trees=(TREE,), max_new_tokens=16)
    seen: list[object] = []
    answers: list[int] = []
    result = run_bench(
        small, TOKENIZER, [long, later], settings, on_question=lambda i, r: seen.append(r), on_answers=answers.append
    )
    assert [(q.question_id, q.turns) for q in result.questions] == [(8, 1)]
    assert [s.skipped for s in result.summaries] == [1] * 4
    assert seen == [None, result.questions[0]]
    assert sum(answers) == count_answers(small, [long, later], settings)
    with pytest.raises(PrismError, match="none of the 1 prompts fits the context of 64"):
        run_bench(small, TOKENIZER, [long], settings)


class LossyEngine(TorchEngine):
    """Breaks what verification relies on: a pass over several tokens prefers other tokens than a pass over one."""

    def forward(self, batch: TokenBatch, logits_for: Any = "all") -> TargetOutput:
        output = super().forward(batch, logits_for)
        if logits_for != "all" or output.logits is None:
            return output
        logits = output.logits.roll(1, dims=-1)
        return TargetOutput(output.features, logits, logits.argmax(-1))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_lossy_engine_is_found_out(methods: list[Method], batch: int) -> None:
    lossy = method("lossy", engine(kind=LossyEngine))
    settings = BenchSettings(trees=(TREE,), max_new_tokens=16, batch=batch)
    result = run_bench([lossy, methods[1]], TOKENIZER, QUESTIONS[1:], settings)
    assert result.identical is False
    assert result.overall("lossy", TREE).identical is False
    assert result.overall("hass", TREE).identical is True


def test_command_exits_with_1_when_outputs_differ(
    engine_directories: dict[str, Path], question_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lossy = engine(kind=LossyEngine)
    monkeypatch.setattr("prism_trt.bench.methods.load_engine", lambda path, threads, slots: lossy)
    arguments = ["--engine", engine_directories["good"], "--questions", question_files[0], "--tree", "8/3/3"]
    done = CliRunner().invoke(app(), [*map(str, arguments), "--json", str(tmp_path / "r.json")], catch_exceptions=False)
    assert done.exit_code == 1
    assert BenchResult.model_validate_json((tmp_path / "r.json").read_text()).identical is False


def test_vanilla_runs_on_the_engine_of_that_name(methods: list[Method]) -> None:
    plain = method("vanilla", engine())
    assert modes_of([*methods, plain], (TREE,))[0].engine is plain.engines[0]
    assert {mode.method for mode in modes_of([*methods, plain], (TREE,))[1:]} == set(NOISES)
    assert modes_of(methods, (TREE,))[0].engine is methods[0].engines[0]


def test_an_unknown_reference_is_refused(methods: list[Method]) -> None:
    settings = SETTINGS.model_copy(update={"reference": "eagle2"})
    with pytest.raises(PrismError, match="reference eagle2 is not among the drafting methods: name one of prism, hass"):
        run_bench(methods, TOKENIZER, QUESTIONS, settings)
