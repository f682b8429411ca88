"""The sweep over batch sizes: what is measured, what is computed from it, and the command."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from prism_trt.bench.batches import (
    PLANNER,
    SweepResult,
    SweepSample,
    SweepSettings,
    count_runs,
    crossover,
    summarise_sweep,
)
from prism_trt.bench.results import VANILLA
from prism_trt.bench.sweep import app
from prism_trt.errors import PrismError
from tests.bench.engines import TREE


def sample(batch: int, repeat: int, mode: str, tokens: int, seconds: float, **rounds: int) -> SweepSample:
    return SweepSample(
        batch=batch, repeat=repeat, mode=mode, tokens=tokens, seconds=seconds, identical=True, rounds=rounds
    )


def test_figures_are_pooled_ratios_within_blocks() -> None:
    settings = SweepSettings(batches=(1, 4), trees=(TREE,), repeats=2)
    tree = str(TREE)
    samples = []
    for repeat, slower in enumerate((1.0, 3.0)):  # the machine of the second block is slower for all
        samples += [
            sample(1, repeat, VANILLA, 100, 1.0 * slower),
            sample(1, repeat, tree, 100, 0.5 * slower),
            sample(1, repeat, PLANNER, 100, 0.5 * slower, none=1, **{tree: 3}),
            sample(4, repeat, VANILLA, 400, 1.0 * slower),
            sample(4, repeat, tree, 400, 2.0 * slower),
            sample(4, repeat, PLANNER, 400, 1.0 * slower, none=5),
        ]
    points = summarise_sweep(samples, settings)
    by_mode = {(point.batch, point.mode): point for point in points}
    assert by_mode[1, VANILLA].tokens_per_second == pytest.approx(50)
    for batch, mode, expected in ((1, tree, 2.0), (1, PLANNER, 2.0), (4, tree, 0.5), (4, PLANNER, 1.0)):
        ratio = by_mode[batch, mode].to_vanilla
        assert ratio is not None
        # However blocks are drawn, their drift cancels.
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((expected,) * 3)
    best = by_mode[4, PLANNER].to_best_tree
    assert best is not None and best.value == pytest.approx(2.0)
    assert by_mode[1, PLANNER].plans == pytest.approx({tree: 0.75, "none": 0.25})
    # From 2 at batch 1 to 0.5 at batch 4: 1 at two thirds of the way, on a logarithmic axis.
    assert crossover(points, tree) == pytest.approx(4 ** (2 / 3))
    assert crossover(points, PLANNER) is None


def test_command_measures_every_mode(
    engine_directories: dict[str, Path], question_files: list[Path], tmp_path: Path
) -> None:
    paths = {name: tmp_path / f"sweep.{name}" for name in ("json", "png", "md")}
    arguments = [
        "--engine",
        str(engine_directories["good"]),
        "--max-new-tokens",
        "12",
        "--repeats",
        "2",
        "--threads",
        "1",
    ]
    outputs = ["--json", str(paths["json"]), "--plot", str(paths["png"]), "--markdown", str(paths["md"])]
    more = ["--tree", "8/3/3", "--tree", "3/1/2", "--questions", str(question_files[0])]
    done = CliRunner().invoke(app(), [*arguments, *outputs, *more], catch_exceptions=False)
    assert done.exit_code == 0
    result = SweepResult.model_validate_json(paths["json"].read_text())
    assert result.settings.batches == (1, 2)  # up to the engine's slots
    assert len(result.samples) == count_runs(result.settings) == 2 * 2 * 4
    assert result.identical
    for entry in result.samples:
        assert entry.tokens > 0 and entry.seconds > 0
        assert bool(entry.rounds) == (entry.mode == PLANNER)
    for batch in (1, 2):
        assert sum(result.point(batch, PLANNER).plans.values()) == pytest.approx(1)
    table = paths["md"].read_text().split("\n\n")[-1].splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 1", "| 2"]
    assert paths["png"].read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_refused(
    engine_directories: dict[str, Path], question_files: list[Path], tmp_path: Path
) -> None:
    json_path = tmp_path / "s.json"

    def run(engine: str, *arguments: str) -> None:
        command = ["--engine", str(engine_directories[engine]), "--json", str(json_path), "--threads", "1", *arguments]
        CliRunner().invoke(app(), command, catch_exceptions=False)

    with pytest.raises(PrismError, match="has no drafter"):
        run("plain")
    with pytest.raises(PrismError, match="--slots 4"):
        run("good", "--batch", "4")
    with pytest.raises(PrismError, match="lower --max-new-tokens"):
        run("good", "--max-new-tokens", "250", "--questions", str(question_files[0]))
    assert not json_path.exists()
