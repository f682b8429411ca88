"""Naming engines and refusing comparisons that say nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from prism_trt.bench.methods import default_tree, load_methods, method_name, read_methods
from prism_trt.engines.manifest import ENGINE_MANIFEST, read_engine_manifest
from prism_trt.errors import PrismError
from tests.bench.engines import TREE


def altered(engine: Path, copy: Path, **fields: Any) -> Path:
    """A copy of an engine directory whose manifest says something else."""
    shutil.copytree(engine, copy)
    manifest = json.loads((copy / ENGINE_MANIFEST).read_text())
    (copy / ENGINE_MANIFEST).write_text(json.dumps({**manifest, **fields}))
    return copy


def test_the_same_name_again_is_another_training_seed(engine_directories: dict[str, Path]) -> None:
    good, worse, bad, plain = (engine_directories[name] for name in ("good", "worse", "bad", "plain"))
    methods = load_methods(read_methods([f"a b={good}", str(worse), f"prism={bad}", str(plain)]), 1, slots=3)
    assert [(method.name, len(method.engines)) for method in methods] == [("a b", 1), ("prism", 2), ("vanilla", 1)]
    assert all(engine.limits.slots == 3 for method in methods for engine in method.engines)
    assert [info.drafter_sha256 for info in methods[1].info.engines] == [
        read_engine_manifest(path).drafter_sha256 for path in (worse, bad)
    ]
    assert default_tree(methods) == TREE


def test_the_default_name_is_the_drafters_kind(engine_directories: dict[str, Path]) -> None:
    drafter = read_engine_manifest(engine_directories["good"]).drafter
    assert drafter is not None
    assert method_name(drafter) == "prism"
    assert method_name(drafter.model_copy(update={"features": "multi"})) == "prism*"
    assert method_name(drafter.model_copy(update={"kind": "hass", "features": "multi"})) == "hass"
    assert method_name(None) == "vanilla"


def test_comparisons_that_say_nothing_are_refused(engine_directories: dict[str, Path], tmp_path: Path) -> None:
    good, plain = engine_directories["good"], engine_directories["plain"]
    stranger = altered(good, tmp_path / "stranger", target_fingerprint="0")
    planned = altered(good, tmp_path / "planned", default_tree={"depth": 1, "width": 2, "size": 3})
    for options, sentence in (
        ([f"a={good}", f"b={stranger}"], "are engines of different targets"),
        ([f"a={good}", f"a={good}"], "hold the same drafter, so they are not two training seeds of a"),
        ([f"a={plain}"], "was built without a drafter: build it with one or call it vanilla="),
        ([str(plain)], "no engine drafts"),
        ([f"a={good}", str(plain), f"vanilla={good}"], "vanilla has several engines"),
        ([f"={good}"], "is not of the form NAME=DIRECTORY"),
        ([str(tmp_path / "a=b")], "is not a directory"),
    ):
        with pytest.raises(PrismError, match=sentence):
            read_methods(options)
    different = load_methods(read_methods([f"a={good}", f"b={planned}"]), 1)
    with pytest.raises(PrismError, match=r"planned for different trees \(8/3/3, 3/2/1\): name one with --tree"):
        default_tree(different)
