"""Results of several runs as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prism_trt.bench.merge import app, merge, renamed
from prism_trt.bench.results import BenchResult, BenchSettings, write_json
from prism_trt.bench.runner import run_bench
from prism_trt.config import parse_json_file
from prism_trt.errors import PrismError
from tests.bench.engines import TREE
from tests.bench.test_bench import QUESTIONS, TOKENIZER, engine, method


def measured(*names: str, **changes: Any) -> BenchResult:
    engines = {"prism": [engine(0.0), engine(0.1)], "hass": [engine(0.2)]}
    settings = BenchSettings(**{"trees": (TREE,), "max_new_tokens": 12, "batch": 2, **changes})
    return run_bench([method(name, *engines[name]) for name in names], TOKENIZER, QUESTIONS, settings)


@pytest.fixture(scope="module")
def prism() -> BenchResult:
    return measured("prism")


@pytest.fixture(scope="module")
def hass() -> BenchResult:
    return measured("hass")


def test_merged_runs_are_one_run_of_all(prism: BenchResult, hass: BenchResult) -> None:
    together, merged = measured("prism", "hass", reference="hass"), merge([prism, hass], "hass")
    assert merged.summaries == together.summaries
    assert merged.methods == together.methods
    assert [len(record.generations) for record in merged.questions] == [
        len(record.generations) for record in together.questions
    ]


def test_runs_may_have_asked_in_another_order(prism: BenchResult, hass: BenchResult) -> None:
    reverse = hass.model_copy(update={"questions": hass.questions[::-1]})
    assert merge([prism, reverse], "hass") == merge([prism, hass], "hass")


def test_command(prism: BenchResult, hass: BenchResult, tmp_path: Path) -> None:
    for name, result in (("a", prism), ("b", hass)):
        write_json(result, tmp_path / f"{name}.json")
    outputs = ["--json", str(tmp_path / "c.json"), "--markdown", str(tmp_path / "c.md"), "--plots", str(tmp_path)]
    inputs = [str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--rename", "prism=old", "--reference", "old"]
    done = CliRunner().invoke(app(), [*inputs, *outputs], catch_exceptions=False)
    assert done.exit_code == 0
    merged = parse_json_file(BenchResult, tmp_path / "c.json")
    assert merged.drafting == ("old", "hass")
    assert merged.overall("old", TREE).al_pooled == prism.overall("prism", TREE).al_pooled
    assert merged.overall("hass", TREE).to_reference is not None
    assert "| hass |" in (tmp_path / "c.md").read_text()
    assert list(tmp_path.glob("*.png"))
    with pytest.raises(PrismError, match="--rename 'absent=x' is not of the form OLD=NEW"):
        CliRunner().invoke(app(), [*inputs, "--rename", "absent=x", *outputs], catch_exceptions=False)


def test_results_that_do_not_compare_are_refused(prism: BenchResult, hass: BenchResult) -> None:
    with pytest.raises(PrismError, match="the method prism is in several results: use --rename"):
        merge([prism, prism], None)
    assert merge([renamed(prism, "prism", "before"), prism], "before").drafting == ("before", "prism")
    with pytest.raises(PrismError, match="the reference eagle2 is in no result: name one of prism, hass"):
        merge([prism, hass], "eagle2")
    with pytest.raises(PrismError, match="result 2 was measured with another max_new_tokens"):
        merge([prism, measured("hass", max_new_tokens=10)], None)
    with pytest.raises(PrismError, match="result 2 has times"):
        merge([prism, measured("hass", batch=1)], None)
    fewer = hass.model_copy(update={"questions": hass.questions[:1]})
    with pytest.raises(PrismError, match="result 2 has other questions"):
        merge([prism, fewer], None)
