"""The command line: what it writes, how it continues, how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prism_trt.bench import runner
from prism_trt.bench.app import app
from prism_trt.bench.journal import Journal
from prism_trt.bench.methods import engine_info
from prism_trt.bench.results import BenchResult
from prism_trt.errors import PrismError
from tests.bench.engines import TREE


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app(), list(map(str, arguments)), catch_exceptions=False)


def read(path: Path) -> BenchResult:
    return BenchResult.model_validate_json(path.read_text())


def test_command_writes_json_markdown_and_plots(
    engine_directories: dict[str, Path], question_files: list[Path], tmp_path: Path
) -> None:
    engines = [f"prism={engine_directories['good']}", engine_directories["worse"], f"hass={engine_directories['bad']}"]
    done = run(
        *(part for path in [*engines, engine_directories["plain"]] for part in ("--engine", path)),
        *("--questions", *question_files, "--json", tmp_path / "r.json", "--reference", "hass"),
        *("--per-set", 2, "--max-new-tokens", 12, "--tree", "4/2/2", "--tree", "6/3/3", "--threads", 1),
        *("--temperature", 0, "--temperature", 1, "--markdown", tmp_path / "r.md", "--plots", tmp_path / "plots"),
    )
    assert done.exit_code == 0
    assert "alpha" in done.output
    result = read(tmp_path / "r.json")
    assert [(m.name, len(m.engines)) for m in result.methods] == [("prism", 2), ("hass", 1), ("vanilla", 1)]
    assert result.methods[0].engines[1] == engine_info(engine_directories["worse"], 1)
    assert len(result.questions) == 4
    sets = ["alpha", "beta", "overall"]
    assert [(s.temperature, s.tree, s.set, s.method) for s in result.summaries] == [
        (t, tree, name, method)
        for t in (0, 1)
        for tree in ("4/2/2", "6/3/3")
        for name in sets
        for method in ("prism", "hass")
    ]
    blocks = (tmp_path / "r.md").read_text().split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert [len(table) for table in tables] == [2 + 24, 2 + 12, 2 + 8]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    names = ("step_acceptance", "acceptance_length", "speedup")
    plots = {f"{name}_{tree}_t{t}.png" for name in names for tree in ("4-2-2", "6-3-3") for t in (0, 1)}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == plots
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plots", "r.json", "r.md"]


def test_an_interrupted_run_continues(
    engine_directories: dict[str, Path], question_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--engine", engine_directories["good"], "--questions", *question_files, "--max-new-tokens", 8]
    arguments += ["--json", tmp_path / "r.json", "--threads", 1]
    generate, calls = runner.generate, 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2 + 5:  # two to warm up, two for each question
            raise KeyboardInterrupt
        return generate(*given)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "generate", interrupted)
        assert run(*arguments).exit_code == 130
    journal = tmp_path / "r.json.partial"
    assert [path.name for path in tmp_path.iterdir()] == [journal.name]
    with journal.open("a") as file:
        file.write('{"index": 2, "rec')  # as if it was killed while writing
    with pytest.raises(PrismError, match="belongs to an unfinished run with other settings"):
        run(*arguments, "--seed", 1)
    kept = [line for line in journal.read_text().splitlines() if '"record"' in line]
    done = run(*arguments)
    assert done.exit_code == 0
    assert "2 of 6 questions were answered earlier" in done.output
    result = read(tmp_path / "r.json")
    assert result.settings.trees == (TREE,)
    assert len(result.questions) == 6
    for record, line in zip(result.questions[:2], kept, strict=True):
        assert record.model_dump_json() in line
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_journal_without_an_answer_is_begun_afresh(
    engine_directories: dict[str, Path], question_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--engine", engine_directories["good"], "--questions", question_files[0], "--max-new-tokens", 8]
    arguments += ["--json", tmp_path / "r.json", "--threads", 1, "--per-set", 1]
    journal = tmp_path / "r.json.partial"

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda journal: None)
        assert run(*arguments).exit_code == 0
    head, answer = journal.read_text().splitlines()
    for left in (head[:20], f"{head}\n", f"{head}\n{answer[:20]}"):
        journal.write_text(left)
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "remove", lambda journal: None)
            assert run(*arguments).exit_code == 0
        assert len(journal.read_text().splitlines()) == 2
        assert "1 of 1 questions were answered earlier" in run(*arguments).output


def test_a_damaged_journal_is_refused(
    engine_directories: dict[str, Path], question_files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "r.json.partial").write_text("{}\n")
    arguments = [
        "--engine",
        engine_directories["good"],
        "--questions",
        question_files[0],
        "--json",
        tmp_path / "r.json",
    ]
    with pytest.raises(PrismError, match=r"r.json.partial is damaged: delete it to start the run afresh"):
        run(*arguments)


def test_mistakes_end_with_one_sentence(
    engine_directories: dict[str, Path], question_files: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question_id": 1, "turns": ["a"]}\nnot json\n')
    engine = ["--engine", engine_directories["good"], "--json", tmp_path / "r.json"]
    questions = ["--questions", question_files[0]]
    for arguments, sentence in (
        ([*engine, "--questions", bad], "line 2 is not valid JSON"),
        (
            [*engine[:2], *questions, "--json", bad / "r.json"],
            r"bad.jsonl/r.json \(File exists\): choose another path",
        ),
        ([*engine, *questions, "--plots", bad], "choose another path, or move what is there"),
        ([*engine, *questions, "--temperature", "inf"], "temperatures.0: Input should be a finite number"),
        ([*engine, *questions, "--seed", "99999999999999999999"], "seed: Input should be less than"),
        ([*engine, *questions, "--tree", "100/2/2"], "size 100 needs 99 drafted nodes"),
        ([*engine, *questions, "--reference", "hass"], "the reference hass is not among the drafting methods"),
        ([*engine, *questions, "--max-new-tokens", 250], "none of the 3 prompts fits the context of 256"),
    ):
        with pytest.raises(PrismError, match=sentence):
            run(*arguments)
    command = [sys.executable, "-m", "prism_trt.bench", *map(str, engine), "--questions", str(bad)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
