from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_trt.drafter.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_drafter, save_drafter, weights_sha256
from prism_trt.errors import PrismError
from tests.tiny import DRAFTERS, tiny_drafter, tiny_target


@pytest.mark.parametrize("vocab", [None, 100])
@pytest.mark.parametrize("shape", DRAFTERS)
def test_round_trip(vocab: int | None, shape: str, tmp_path: Path) -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, draft_vocab_size=vocab, provenance={"seed": 3}, **DRAFTERS[shape])
    save_drafter(drafter, tmp_path / "drafter")
    loaded = load_drafter(tmp_path / "drafter", target)
    assert loaded.config == drafter.config
    assert weights_sha256(loaded) == weights_sha256(drafter)
    assert (loaded.draft_vocab is None) == (vocab is None)


def test_names_in_the_file(tmp_path: Path) -> None:
    save_drafter(tiny_drafter(tiny_target(), modules=2, fc_bias=True), tmp_path / "drafter")
    layer = [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        "post_attention_layernorm",
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    expected = {"draft_vocab"}
    for module in (0, 1):
        expected |= {f"modules.{module}.fc.weight", f"modules.{module}.fc.bias"}
        expected |= {f"modules.{module}.layer.{name}.weight" for name in layer}
    assert set(load_file(tmp_path / "drafter" / WEIGHTS_FILE)) == expected


def test_weights_are_stored_as_they_are_and_loaded_as_asked(tmp_path: Path) -> None:
    drafter = tiny_drafter(tiny_target()).bfloat16()
    save_drafter(drafter, tmp_path / "drafter")
    assert load_file(tmp_path / "drafter" / WEIGHTS_FILE)["modules.0.fc.weight"].dtype == torch.bfloat16
    single = load_drafter(tmp_path / "drafter")
    assert all(parameter.dtype == torch.float32 for parameter in single.parameters())
    half = load_drafter(tmp_path / "drafter", dtype=torch.bfloat16)
    assert weights_sha256(half) == weights_sha256(drafter)


def test_a_drafter_of_another_target_or_tokenizer_is_refused(tmp_path: Path) -> None:
    save_drafter(tiny_drafter(tiny_target()), tmp_path / "drafter")
    with pytest.raises(PrismError, match="another target or tokenizer"):
        load_drafter(tmp_path / "drafter", tiny_target(rms_norm_eps=1e-4))
    with pytest.raises(PrismError, match="another target or tokenizer"):
        load_drafter(tmp_path / "drafter", tiny_target(vocab_size=330))


def test_damage_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "drafter"
    save_drafter(tiny_drafter(tiny_target()), directory)
    weights, config = directory / WEIGHTS_FILE, directory / CONFIG_FILE
    sound, described = load_file(weights), config.read_text()

    def broken(message: str) -> None:
        with pytest.raises(PrismError, match=message):
            load_drafter(directory)

    save_file({name: value for name, value in sound.items() if name != "modules.1.fc.weight"}, weights)
    broken(r"lacks the tensor modules\.1\.fc\.weight")
    save_file(sound | {"modules.2.fc.weight": torch.zeros(1)}, weights)
    broken(r"unknown tensor modules\.2\.fc\.weight")
    save_file(sound | {"modules.1.fc.weight": torch.zeros(64, 64)}, weights)
    broken(r"modules\.1\.fc\.weight has shape \[64, 64\]")
    save_file(sound | {"draft_vocab": sound["draft_vocab"].flip(0)}, weights)
    broken("ascending")
    save_file({name: value for name, value in sound.items() if name != "draft_vocab"}, weights)
    broken("draft vocabulary of None tokens")

    save_file(sound, weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    broken("cannot be read")
    weights.unlink()
    broken("cannot be read")

    save_file(sound, weights)
    config.write_text(json.dumps(json.loads(described) | {"kind": "eagle5"}))
    broken("kind")
    config.write_text(described[:40])
    broken("not valid JSON")
    config.unlink()
    broken(f"has no {CONFIG_FILE}")


def test_an_existing_directory_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    first, second = tiny_drafter(tiny_target(), seed=1), tiny_drafter(tiny_target(), seed=2)
    save_drafter(first, tmp_path / "drafter")
    with pytest.raises(PrismError, match="already exists"):
        save_drafter(second, tmp_path / "drafter")
    assert weights_sha256(load_drafter(tmp_path / "drafter")) == weights_sha256(first)
    save_drafter(second, tmp_path / "drafter", overwrite=True)
    assert weights_sha256(load_drafter(tmp_path / "drafter")) == weights_sha256(second)
