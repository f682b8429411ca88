"""A finished drafter decides its shape: options that name another are refused, those left out follow it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prism_trt.config import TrainConfig
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.errors import PrismError
from prism_trt.train.app import app
from prism_trt.train.initial import load_init
from tests.tiny import tiny_drafter, tiny_target
from tests.train.test_app import arguments

ONLY_TUNED = {"one_step_updates": 0, "alignment_updates": 0, "modules": 2, "step_map": "0,1"}
OTHERS: dict[str, dict[str, Any]] = {
    "--features last": {"features": "multi", "feature_layers": (0, 1, 1)},
    "--layers 1": {"num_layers": 2},
    "--draft-vocab-size 200": {"draft_vocab_size": 100},
    "--intermediate-size 96": {"intermediate_size": 48},
}


def saved(directory: Path, **fields: Any) -> Path:
    save_drafter(tiny_drafter(tiny_target(), **{"modules": 1, **fields}), directory)
    return directory


@pytest.mark.parametrize("option", OTHERS)
def test_another_shape_is_refused_when_it_is_given_and_else_taken(option: str, tmp_path: Path) -> None:
    init = saved(tmp_path / "init", **OTHERS[option])
    name, value = option.removeprefix("--").replace("-", "_").split(" ")
    with pytest.raises(PrismError, match=f"{option} is not what the initial drafter has"):
        load_init(init, tiny_target(), TrainConfig.model_validate({name: value}))
    drafter, config = load_init(init, tiny_target(), TrainConfig())
    own = {"layers": "num_layers"}.get(name, name)
    assert getattr(config, name) == getattr(drafter.config, own) == OTHERS[option][own]


def test_the_same_shape_may_be_given(tmp_path: Path) -> None:
    given = TrainConfig(features="last", layers=1, draft_vocab_size=200, intermediate_size=96, kv_mode="producer")
    assert load_init(saved(tmp_path / "init"), tiny_target(), given)[1] == given
    whole = saved(tmp_path / "whole", draft_vocab_size=None)
    for size in (0, 8192):  # of more tokens than the target has
        assert load_init(whole, tiny_target(), TrainConfig(draft_vocab_size=size))[1].draft_vocab_size == size
    with pytest.raises(PrismError, match="which is 0"):
        load_init(whole, tiny_target(), TrainConfig(draft_vocab_size=100))


def test_the_shape_of_a_standard_drafter_is_taken(tmp_path: Path) -> None:
    fields = {"kind": "standard", "features": "none", "hidden_size": 32, "intermediate_size": 40, "num_layers": 2}
    init = saved(tmp_path / "init", **fields, num_heads=2, num_kv_heads=1)
    config = load_init(init, tiny_target(), TrainConfig(kind="standard"))[1]
    assert (config.width, config.layers, config.intermediate_size) == (32, 2, 40)
    with pytest.raises(PrismError, match="--width 48 is not"):
        load_init(init, tiny_target(), TrainConfig(kind="standard", width=48))
    with pytest.raises(PrismError, match="pass the same --kind"):
        load_init(init, tiny_target(), TrainConfig())


def test_the_kv_mode_is_applied_when_it_is_given_and_else_taken(tmp_path: Path) -> None:
    init = saved(tmp_path / "init", modules=2, kv_mode="current")
    drafter, config = load_init(init, tiny_target(), TrainConfig.model_validate(ONLY_TUNED))
    assert drafter.config.kv_mode == config.kv_mode == "current"
    drafter, config = load_init(init, tiny_target(), TrainConfig.model_validate(ONLY_TUNED | {"kv_mode": "producer"}))
    assert drafter.config.kv_mode == config.kv_mode == "producer"


def test_a_measured_step_map_and_several_modules_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="can only be tuned as it is"):
        config = TrainConfig.model_validate(ONLY_TUNED | {"step_map": "auto"})
        load_init(saved(tmp_path / "init", modules=2), tiny_target(), config)


def test_other_fused_states_than_those_computed_are_refused(tmp_path: Path) -> None:
    init = saved(tmp_path / "init", features="multi", feature_layers=(0, 1, 2))
    with pytest.raises(PrismError, match=r"fuses the hidden states \[0, 1, 2\], but training computes \[0, 1, 1\]"):
        load_init(init, tiny_target(), TrainConfig())


def test_the_command_line_tells_given_options_from_defaults_and_records_what_was_used(
    trained_on: Path, tmp_path: Path
) -> None:
    """The tiny vocabulary of 320 is smaller than the default 8192, so the default means all of it."""
    init = saved(tmp_path / "init", draft_vocab_size=100, features="multi", feature_layers=(0, 1, 1))
    options = arguments(trained_on, init=str(init), out=str(tmp_path / "out"), kind="eagle2", one_step_updates="2")
    at = options.index("--draft-vocab-size")
    with pytest.raises(PrismError, match="--draft-vocab-size 200 is not"):
        CliRunner().invoke(app(), options, catch_exceptions=False)
    assert not (tmp_path / "out.work").exists()
    result = CliRunner().invoke(app(), options[:at] + options[at + 2 :], catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    recorded = written["provenance"]["training"]
    assert (written["draft_vocab_size"], recorded["draft_vocab_size"], recorded["features"]) == (100, 100, "multi")
