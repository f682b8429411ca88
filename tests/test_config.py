"""Configs refuse what they do not know, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_trt.config import DrafterConfig, GenerationConfig, TrainConfig, TreeShape, parse, parse_json_file
from prism_trt.errors import PrismError

DRAFTER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "num_modules": 2,
    "step_map": [0, 1],
    "target_fingerprint": "f",
}


@given(
    depth=st.integers(1, 16),
    width=st.integers(1, 32),
    size=st.integers(2, 128),
)
def test_tree_accepts_exactly_what_can_be_drafted(depth: int, width: int, size: int) -> None:
    # One root expanded into `width` nodes, then every step expands `width` of them into `width` children each.
    drafted, frontier = 0, 1
    for _ in range(depth):
        drafted += frontier * width
        frontier = width
    text = f"{size}/{width}/{depth}"
    if size - 1 <= drafted:
        shape = TreeShape.parse(text)
        assert (shape.size, shape.width, shape.depth) == (size, width, depth)
        assert str(shape) == text
    else:
        with pytest.raises(PrismError, match=f"the tree drafts only {drafted}"):
            TreeShape.parse(text)


@pytest.mark.parametrize("text", ["", "60", "60/10", "60/10/6/1", "a/b/c", "60 10 6", "6.5/1/1", "8/4/5@x"])
def test_tree_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(PrismError, match="is not of the form SIZE/WIDTH/DEPTH or "):
        TreeShape.parse(text)


@pytest.mark.parametrize("text", ["1/1/1", "129/10/6", "60/0/6", "60/33/6", "60/10/0", "60/10/17", "-3/1/1"])
def test_tree_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(PrismError, match=f"tree {text}: (size|width|depth): "):
        TreeShape.parse(text)


def test_an_error_of_the_whole_is_one_plain_sentence() -> None:
    with pytest.raises(PrismError, match=r"^tree 60/1/1: size 60 needs 59 drafted nodes but the tree drafts only 1$"):
        TreeShape.parse("60/1/1")
    with pytest.raises(PrismError, match=r"^command line: step_map must use every module 0\.\.1, as in 0,1,1$"):
        parse(TrainConfig, {"step_map": "0"}, "command line")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
def test_options_that_are_not_finite_are_refused(value: float) -> None:
    for model in (GenerationConfig, TrainConfig):
        for name, field in model.model_fields.items():
            if field.annotation is float:
                with pytest.raises(PrismError, match=f"there: {name}: "):
                    parse(model, {name: value}, "there")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 99999999999999999999}, "seed: Input should be less than"),
        ({"noise": 1e39}, "noise: Input should be less than"),
        ({"tuning_lr": 1e300}, "tuning_lr: Input should be less than"),
        ({"cross_entropy_weight": 1e-320}, "cross_entropy_weight: Input should be greater than"),
        ({"intermediate_size": 1 << 40}, "intermediate_size: Input should be less than"),
        ({"step_map": "auto", "modules": 6, "tuning_steps": 8}, "measures 5 draft steps, too few for 6 modules"),
        ({"step_map": "auto", "hold_back": 0}, "raise hold_back, or name the step map"),
    ],
)
def test_trainings_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(PrismError, match=f"there: .*{message}"):
        parse(TrainConfig, values, "there")


def test_what_no_stage_measures_does_not_limit_the_modules() -> None:
    TrainConfig(step_map="auto", modules=5, tuning_steps=8)
    TrainConfig(step_map="auto", modules=1, hold_back=0)
    TrainConfig(step_map="auto", kind="hass", modules=6, tuning_steps=8)


def test_unknown_keys_are_refused_by_name() -> None:
    with pytest.raises(PrismError, match="there: num_modulse: "):
        parse(DrafterConfig, {**DRAFTER, "num_modulse": 2}, "there")


def test_configs_are_immutable() -> None:
    shape = TreeShape()
    with pytest.raises(ValueError, match="frozen"):
        shape.depth = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"step_map": [0, 0]}, "must use every module 0..1"),
        ({"step_map": [0, 1, 2]}, "must use every module 0..1"),
        ({"step_map": []}, "must use every module 0..1"),
        ({"head_dim": 3}, "head_dim: "),
        ({"kind": "eagle"}, "kind: "),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type: "),
    ],
)
def test_inconsistent_drafters_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(PrismError, match=f"there: .*{message}"):
        parse(DrafterConfig, {**DRAFTER, **change}, "there")


def test_json_round_trip(tmp_path: Path) -> None:
    config = parse(DrafterConfig, DRAFTER, "there")
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert parse_json_file(DrafterConfig, path) == config


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", "must hold a JSON object")])
def test_broken_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(PrismError, match=message):
        parse_json_file(DrafterConfig, path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=r"cannot read .*config\.json: No such file"):
        parse_json_file(DrafterConfig, tmp_path / "config.json")


def test_missing_key_is_refused_by_name() -> None:
    values = {key: value for key, value in DRAFTER.items() if key != "hidden_size"}
    with pytest.raises(PrismError, match="there: hidden_size: Field required"):
        parse(DrafterConfig, json.loads(json.dumps(values)), "there")
