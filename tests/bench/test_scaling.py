"""Acceptance length over the size of the training data."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from prism_trt.bench.results import BenchResult, BenchSettings, Estimate, write_json
from prism_trt.bench.runner import run_bench
from prism_trt.bench.scaling import app, curves, read_points
from prism_trt.errors import PrismError
from tests.bench.engines import TREE
from tests.bench.test_bench import OTHER, QUESTIONS, TOKENIZER, engine, method


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Results of drafters that get better with the size."""
    directory = tmp_path_factory.mktemp("scaling")
    files: dict[float, Path] = {}
    settings = BenchSettings(trees=(TREE,), max_new_tokens=12, batch=2)
    for size, noise in ((1000, 0.3), (4000, 0.0)):
        methods = [method("prism", engine(noise)), method("hass", engine(0.2))]
        files[size] = directory / f"{size}.json"
        write_json(run_bench(methods, TOKENIZER, QUESTIONS, settings), files[size])
    return files


def length(path: Path, name: str) -> Estimate:
    found = BenchResult.model_validate_json(path.read_text()).overall(name, TREE).al_pooled
    assert found is not None
    return found


def test_command_draws_and_tabulates_every_method(files: dict[float, Path], tmp_path: Path) -> None:
    points = [part for size in (4000, 1000) for part in ("--point", f"{size}={files[size]}")]
    outputs = ["--plot", str(tmp_path / "s.png"), "--markdown", str(tmp_path / "s.md")]
    done = CliRunner().invoke(app(), [*points, *outputs, "--unit", "answers"], catch_exceptions=False)
    assert done.exit_code == 0
    assert length(files[4000], "prism").value > length(files[1000], "prism").value
    table = (tmp_path / "s.md").read_text().split("\n\n")[1].splitlines()
    assert table[0] == "| answers | prism | hass |"
    for line, size in zip(table[2:], (1000, 4000), strict=True):
        cells = [length(files[size], name) for name in ("prism", "hass")]
        texts = [f"{cell.value:.2f} [{cell.low:.2f}, {cell.high:.2f}]" for cell in cells]
        assert line == f"| {size} | {texts[0]} | {texts[1]} |"
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_results_that_do_not_compare_are_refused(files: dict[float, Path], tmp_path: Path) -> None:
    for option in (str(files[1000]), f"x={files[1000]}", f"0={files[1000]}", "1000="):
        with pytest.raises(PrismError, match="is not of the form SIZE=FILE"):
            read_points([option])
    with pytest.raises(PrismError, match="size 1e3 appears twice"):
        read_points([f"1000={files[1000]}", f"1e3={files[4000]}"])
    results = read_points([f"{size}={path}" for size, path in files.items()])
    with pytest.raises(PrismError, match="has no tree 4/2/2 at temperature 0"):
        curves(results, OTHER, 0.0)
    fewer = results[4000].model_copy(update={"questions": results[4000].questions[:1]})
    with pytest.raises(PrismError, match="the result of size 4000 answers other questions"):
        curves({**results, 4000: fewer}, TREE, 0.0)
