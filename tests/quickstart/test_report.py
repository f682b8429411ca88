from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from prism_trt.bench.results import BenchResult, write_json
from prism_trt.quickstart.measuring import measure, own_questions
from prism_trt.quickstart.report import quickstart_result, result_table, write_figure
from tests.bench.engines import TREE, build, no_compiler


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    answered: list[None] = []
    with no_compiler():
        engine = build(tmp_path_factory.mktemp("tiny"))
    result = measure(engine, 1, lambda: answered.append(None))
    assert len(answered) == len(own_questions())
    return result


def test_measuring_uses_the_engines_tree_and_finds_identical_output(result: BenchResult) -> None:
    assert result.settings.trees == (TREE,)
    assert result.identical is True
    summary = result.overall("prism", TREE)
    assert summary.questions + summary.skipped == len(own_questions())


def test_figures_have_exactly_the_promised_keys(result: BenchResult, tmp_path: Path) -> None:
    write_json(quickstart_result(result), tmp_path / "q.json")
    written = json.loads((tmp_path / "q.json").read_text())
    assert set(written) == {
        "vanilla_tps",
        "prism_tps",
        "speedup",
        "acceptance_length",
        "identical",
        "per_step_acceptance",
    }
    entries = [entry for question in result.questions for entry in question.generations]
    drafted, plain = ([e for e in entries if (e.method == "vanilla") == vanilla] for vanilla in (False, True))
    tps = [
        sum(e.decode_tokens for e in group) / sum(e.decode_seconds or 0.0 for e in group) for group in (drafted, plain)
    ]
    assert written["prism_tps"] == pytest.approx(tps[0])
    assert written["vanilla_tps"] == pytest.approx(tps[1])
    assert written["speedup"] == pytest.approx(tps[0] / tps[1])
    assert written["acceptance_length"] == pytest.approx(
        sum(e.decode_tokens for e in drafted) / sum(e.target_passes for e in drafted)
    )
    assert written["identical"] is True
    assert len(written["per_step_acceptance"]) == TREE.depth


def test_table_shows_the_figures(result: BenchResult) -> None:
    console = Console(width=100, record=True, file=StringIO())
    console.print(result_table(result))
    text = console.export_text()
    figures = quickstart_result(result)
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") == 4}
    assert f"{figures.vanilla_tps:.0f}" in lines["tokens per second"]
    assert f"{figures.prism_tps:.0f}" in lines["tokens per second"]
    assert f"{figures.acceptance_length:.2f}" in lines["tokens per target pass"]
    assert "yes" in lines["output identical"]
    assert [name for name in lines if name.startswith("accepted")] == [
        f"accepted at draft step {step}" for step in range(1, TREE.depth + 1)
    ]


def test_a_difference_is_shown(result: BenchResult) -> None:
    changed = tuple(summary.model_copy(update={"identical": False}) for summary in result.summaries)
    console = Console(width=100, record=True, file=StringIO())
    console.print(result_table(result.model_copy(update={"summaries": changed})))
    assert "NO" in next(line for line in console.export_text().splitlines() if "output identical" in line)


def test_plot_is_a_png(result: BenchResult, tmp_path: Path) -> None:
    write_figure(quickstart_result(result), tmp_path / "q.png")
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["q.png"]
