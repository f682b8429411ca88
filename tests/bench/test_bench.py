from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from prism_trt.bench.app import app, default_tree, engine_info
from prism_trt.bench.questions import Question
from prism_trt.bench.results import BenchResult, BenchSettings, EngineInfo
from prism_trt.bench.runner import run_bench
from prism_trt.bench.summary import summarise
from prism_trt.config import TreeShape
from prism_trt.engines.loading import load_engine, load_engine_tokenizer
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
INFO = EngineInfo(
    profile="cpu", runtime="torch", dtype="float32", isa=None, target_fingerprint="0", drafter_sha256=None, threads=1
)


@pytest.fixture(scope="module")
def engine(engine_directory: Path) -> Engine:
    return load_engine(engine_directory, threads=1)


@pytest.fixture(scope="module")
def result(engine: Engine, engine_directory: Path) -> BenchResult:
    settings = BenchSettings(trees=(TREE, OTHER), max_new_tokens=24, repeats=2)
    tokenizer = load_engine_tokenizer(engine_directory)
    return run_bench(engine, tokenizer, QUESTIONS, settings, engine_info(engine_directory, 1))


def generations(result: BenchResult, tree: str, set_name: str | None = None) -> Iterator[tuple[Any, Any]]:
    for question in result.questions:
        if set_name in (None, question.set):
            for entry in question.generations:
                if entry.mode == tree:
                    yield question, entry


def test_every_mode_runs_every_turn_and_repeat(result: BenchResult) -> None:
    assert [(q.set, q.question_id, q.turns) for q in result.questions] == [
        ("first", 1, 2),
        ("first", 2, 1),
        ("second", 1, 1),
    ]
    for question in result.questions:
        runs = [(entry.mode, entry.turn, entry.repeat) for entry in question.generations]
        expected = {
            (mode, turn, repeat)
            for mode in ("vanilla", str(TREE), str(OTHER))
            for turn in range(question.turns)
            for repeat in range(2)
        }
        assert len(runs) == len(expected)
        assert set(runs) == expected


def test_modes_alternate_in_order(result: BenchResult) -> None:
    orders = [[entry.mode for entry in question.generations[:3]] for question in result.questions]
    forward = ["vanilla", str(TREE), str(OTHER)]
    assert orders == [forward, forward[::-1], forward]


def test_greedy_output_is_identical(result: BenchResult) -> None:
    assert result.identical is True
    assert all(question.identical is True for question in result.questions)
    assert all(summary.identical is True for summary in result.summaries)


def test_vanilla_commits_one_token_per_pass(result: BenchResult) -> None:
    for _, entry in generations(result, "vanilla"):
        assert entry.target_passes == entry.decode_tokens == entry.output_tokens - 1
        assert entry.drafted == entry.accepted == 0


@pytest.mark.parametrize("tree", [TREE, OTHER])
@pytest.mark.parametrize("set_name", ["first", "second", None])
def test_figures_follow_from_the_raw_counts(result: BenchResult, tree: TreeShape, set_name: str | None) -> None:
    summary = next(s for s in result.summaries if (s.set, s.tree) == (set_name or "overall", str(tree)))
    drafted = [entry for _, entry in generations(result, str(tree), set_name)]
    plain = [entry for _, entry in generations(result, "vanilla", set_name)]

    def rate(entries: list[Any], tokens: str, seconds: str) -> float:
        return sum(getattr(e, tokens) for e in entries) / sum(getattr(e, seconds) for e in entries)

    prism, vanilla = (rate(entries, "decode_tokens", "decode_seconds") for entries in (drafted, plain))
    assert summary.prism.decode_tps == pytest.approx(prism)
    assert summary.vanilla.decode_tps == pytest.approx(vanilla)
    assert summary.speedup == pytest.approx(prism / vanilla)
    ends = [rate(entries, "output_tokens", "total_seconds") for entries in (drafted, plain)]
    assert summary.end_to_end_speedup == pytest.approx(ends[0] / ends[1])
    assert summary.al_pooled == pytest.approx(
        sum(entry.output_tokens - 1 for entry in drafted) / sum(entry.target_passes for entry in drafted)
    )
    lengths: dict[tuple[str, object], list[int]] = {}
    for question, entry in generations(result, str(tree), set_name):
        pair = lengths.setdefault((question.set, question.question_id), [0, 0])
        pair[0] += entry.output_tokens - 1
        pair[1] += entry.target_passes
    assert summary.al_question_mean == pytest.approx(statistics.mean(a / b for a, b in lengths.values()))
    assert summary.questions == len(lengths)

    accepted = [a for entry in drafted for a, n in enumerate(entry.accepted_counts) for _ in range(n)]
    assert sum(accepted) == sum(entry.accepted for entry in drafted)
    assert len(accepted) == sum(entry.target_passes for entry in drafted)
    assert len(summary.step_acceptance) == tree.depth
    for k, share in enumerate(summary.step_acceptance):
        reached = sum(a >= k for a in accepted)
        assert share == (pytest.approx(sum(a > k for a in accepted) / reached) if reached else None)


def test_the_drafter_is_neither_always_nor_never_right(result: BenchResult) -> None:
    """Otherwise the tests of the arithmetic would say little."""
    shares = result.overall(TREE).step_acceptance
    assert shares[0] is not None
    assert 0.1 < shares[0] < 0.95


def test_intervals_hold_their_estimates(result: BenchResult) -> None:
    for summary in result.summaries:
        for value, bounds in (
            (summary.speedup, summary.speedup_interval),
            (summary.al_pooled, summary.al_pooled_interval),
            (summary.al_question_mean, summary.al_question_mean_interval),
        ):
            assert value is not None
            assert bounds is not None
            assert bounds.low <= value + 1e-9
            assert value <= bounds.high + 1e-9
    single = next(s for s in result.summaries if s.set == "second")
    assert single.al_pooled_interval is not None
    assert single.al_pooled_interval.low == single.al_pooled_interval.high == pytest.approx(single.al_pooled)


def test_json_reads_back_as_it_was(result: BenchResult) -> None:
    assert BenchResult.model_validate_json(result.model_dump_json()) == result


def test_the_second_turn_sees_the_first_answer(result: BenchResult) -> None:
    (question,) = [q for q in result.questions if (q.set, q.question_id) == ("first", 1)]
    first, second = (next(e for e in question.generations if (e.mode, e.turn) == ("vanilla", t)) for t in (0, 1))
    assert second.prompt_tokens > first.prompt_tokens + first.output_tokens // 2


def test_prompts_that_do_not_fit_are_skipped_and_counted() -> None:
    target, drafter = agreeing_models()
    small = TorchEngine(target, drafter, EngineLimits(1, 64, 64), torch.device("cpu"), torch.float32)
    long = Question("first", 9, "", ("long " * 60,))
    later = Question("first", 8, "", ("a", "long " * 60))
    settings = BenchSettings(trees=(TREE,), max_new_tokens=16)
    seen: list[object] = []
    result = run_bench(small, target.tokenizer, [long, later], settings, INFO, seen.append)
    assert [(q.question_id, q.turns) for q in result.questions] == [(8, 1)]
    assert [s.skipped for s in result.summaries] == [1, 1]
    assert seen == [None, result.questions[0]]
    with pytest.raises(PrismError, match="none of the 1 prompts fits the context of 64"):
        run_bench(small, target.tokenizer, [long], settings, INFO)


def test_sampling_is_not_compared(engine: Engine, engine_directory: Path) -> None:
    settings = BenchSettings(trees=(OTHER,), max_new_tokens=8, temperature=1.0)
    tokenizer = load_engine_tokenizer(engine_directory)
    result = run_bench(engine, tokenizer, QUESTIONS[:1], settings, INFO)
    assert result.identical is None
    assert result.summaries[0].identical is None


class LossyEngine(TorchEngine):
    """Breaks what verification relies on: a pass over several tokens prefers other tokens than a pass over one."""

    def forward(self, batch: TokenBatch, logits_for: Any = "all") -> TargetOutput:
        output = super().forward(batch, logits_for)
        if logits_for != "all" or output.logits is None:
            return output
        logits: Tensor = output.logits.roll(1, dims=-1)
        return TargetOutput(output.features, logits, logits.argmax(-1))


def test_a_lossy_engine_is_found_out() -> None:
    target, drafter = agreeing_models()
    lossy = LossyEngine(target, drafter, EngineLimits(1, 256, 64), torch.device("cpu"), torch.float32)
    settings = BenchSettings(trees=(TREE,), max_new_tokens=16)
    result = run_bench(lossy, target.tokenizer, QUESTIONS[1:], settings, INFO)
    assert result.identical is False
    assert result.overall(TREE).identical is False


def test_an_engine_without_drafter_is_refused() -> None:
    target, _ = agreeing_models()
    plain = TorchEngine(target, None, EngineLimits(1, 256, 64), torch.device("cpu"), torch.float32)
    with pytest.raises(PrismError, match="built without a drafter"):
        run_bench(plain, target.tokenizer, QUESTIONS, BenchSettings(trees=(TREE,)), INFO)


@pytest.fixture(scope="module")
def question_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("questions")
    files = []
    for name in ("alpha", "beta"):
        path = directory / name / "question.jsonl"
        path.parent.mkdir()
        lines = [{"question_id": i, "turns": [f"{name} {i}"]} for i in range(3)]
        path.write_text("\n".join(map(json.dumps, lines)))
        files.append(path)
    return files


def test_command_writes_json_markdown_and_plots(
    engine_directory: Path, question_files: list[Path], tmp_path: Path
) -> None:
    arguments = ["--engine", engine_directory, "--questions", *question_files, "--json", tmp_path / "r.json"]
    arguments += ["--per-set", 2, "--max-new-tokens", 12, "--tree", "4/2/2", "--tree", "6/3/3", "--threads", 1]
    arguments += ["--markdown", tmp_path / "r.md", "--plots", tmp_path / "plots"]
    done = CliRunner().invoke(app(), list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    assert "alpha" in done.output
    result = BenchResult.model_validate_json((tmp_path / "r.json").read_text())
    assert [s.set for s in result.summaries] == ["alpha", "beta", "overall"] * 2
    assert [s.tree for s in result.summaries] == ["4/2/2"] * 3 + ["6/3/3"] * 3
    assert len(result.questions) == 4
    assert result.engine == engine_info(engine_directory, 1)
    table = [line for line in (tmp_path / "r.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6
    assert len({line.count("|") for line in table}) == 1
    for name in ("step_acceptance", "acceptance_length", "speedup"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plots", "r.json", "r.md"]


def test_command_takes_the_engines_tree_when_none_is_given(
    engine_directory: Path, question_files: list[Path], tmp_path: Path
) -> None:
    arguments = ["--engine", engine_directory, "--questions", question_files[0], "--json", tmp_path / "r.json"]
    arguments += ["--per-set", 1, "--max-new-tokens", 4]
    done = CliRunner().invoke(app(), list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    assert BenchResult.model_validate_json((tmp_path / "r.json").read_text()).settings.trees == (TREE,)
    assert default_tree(load_engine(engine_directory)) == TREE


def test_mistakes_end_with_one_sentence(engine_directory: Path, question_files: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question_id": 1, "turns": ["a"]}\nnot json\n')
    command = [sys.executable, "-m", "prism_trt.bench", "--engine", str(engine_directory)]
    for questions, tree, sentence in (
        (bad, "4/2/2", "line 2 is not valid JSON"),
        (question_files[0], "4-2-2", "not of the form SIZE/WIDTH/DEPTH"),
        (question_files[0], "100/2/2", "size 100 needs 99 drafted nodes"),
    ):
        options = ["--questions", str(questions), "--tree", tree, "--json", str(tmp_path / "r.json")]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "r.json").exists()


def test_command_exits_with_1_when_outputs_differ(
    engine_directory: Path, question_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = agreeing_models()
    lossy = LossyEngine(target, drafter, EngineLimits(1, 256, 64), torch.device("cpu"), torch.float32)
    monkeypatch.setattr("prism_trt.bench.app.load_engine", lambda path, threads: lossy)
    arguments = ["--engine", engine_directory, "--questions", question_files[0], "--json", tmp_path / "r.json"]
    done = CliRunner().invoke(app(), [*map(str, arguments), "--tree", "8/3/3"], catch_exceptions=False)
    assert done.exit_code == 1
    assert BenchResult.model_validate_json((tmp_path / "r.json").read_text()).identical is False


def test_bootstrap_is_reproducible_from_the_written_counts(result: BenchResult) -> None:
    assert summarise(result.questions, {}, result.settings) == result.summaries
    other = summarise(result.questions, {}, result.settings.model_copy(update={"seed": 5}))
    assert [s.al_pooled for s in other] == [s.al_pooled for s in result.summaries]
    assert np.isfinite([s.al_pooled_interval.low for s in other if s.al_pooled_interval]).all()
