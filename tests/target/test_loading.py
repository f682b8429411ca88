"""Loading targets, and refusing what is not one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_trt.errors import PrismError
from prism_trt.target.loading import Target, load_target, save_hf
from tests.tiny import tiny_target


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_hf(tiny_target(), tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}, {"qkv_bias": True}])
def test_round_trip_keeps_weights_and_fingerprint(options: dict[str, Any], tmp_path: Path) -> None:
    target = tiny_target(**options)
    save_hf(target, tmp_path / "model")
    loaded = load_target(tmp_path / "model")
    assert loaded.fingerprint == target.fingerprint
    assert loaded.config == target.config
    for name, tensor in target.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


def test_weights_can_keep_their_stored_types(tmp_path: Path) -> None:
    target = tiny_target()
    target.model.bfloat16().model.norm.float()
    save_hf(target, tmp_path / "model")
    state = load_target(tmp_path / "model", None).model.state_dict()
    for name, tensor in target.model.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)


def test_transformers_reads_what_save_hf_writes(saved: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tiny_target()
    messages = [{"role": "user", "content": "fox"}]
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.apply_chat_template(messages, return_dict=False, add_generation_prompt=True) == (
        target.tokenizer.encode_chat(messages)
    )
    tokens = torch.tensor([target.tokenizer.encode_chat(messages)])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)(tokens).logits
        actual = target.model.head(target.model.forward_sequence(tokens))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_sharded_weights_load(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: state[name] for name in members}, saved / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    (saved / "model.safetensors").unlink()
    assert load_target(saved).fingerprint == tiny_target().fingerprint
    (saved / "b.safetensors").unlink()
    with pytest.raises(PrismError, match=r"b\.safetensors does not exist"):
        load_target(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model type 'mistral' is not supported"),
        ({"model_type": None}, "model type None is not supported"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"num_local_experts": 8}, "mixture-of-experts"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_attention_heads": "4", "head_dim": None}, "wrong kind"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"intermediate_size": 128}, "has shape"),
        ({"num_hidden_layers": 3}, "lacks the tensor"),
        ({"num_hidden_layers": 1}, "unexpected tensor"),
        ({"vocab_size": 300}, "has shape|only 300"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], message: str, saved: Path) -> None:
    edit_config(saved, **changes)
    with pytest.raises(PrismError, match=message):
        load_target(saved)


def _truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _garbage(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(b"{ not json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "truncated or damaged"),
        (_remove("model.safetensors"), "neither model.safetensors nor"),
        (_remove("config.json"), "has no config.json"),
        (_remove("tokenizer.json"), "does not exist"),
        (_garbage("config.json"), "not valid JSON"),
        (_garbage("tokenizer.json"), "not a valid tokenizer.json"),
        (_garbage("model.safetensors"), "truncated or damaged"),
    ],
)
def test_damaged_directories_are_refused(damage: Callable[[Path], None], message: str, saved: Path) -> None:
    damage(saved)
    with pytest.raises(PrismError, match=message):
        load_target(saved)


def test_wrong_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="does not exist"):
        load_target(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(PrismError, match="not a GGUF file"):
        load_target(tmp_path / "notes.txt")


def test_truncated_gguf_is_refused(smollm2_path: Path, tmp_path: Path) -> None:
    with smollm2_path.open("rb") as file:
        (tmp_path / "half.gguf").write_bytes(file.read(3_000_000))
    with pytest.raises(PrismError, match="truncated, damaged or not supported"):
        load_target(tmp_path / "half.gguf")


def test_gguf_and_directory_agree(smollm2: Target, tmp_path: Path) -> None:
    save_hf(smollm2, tmp_path / "hf")
    assert load_target(tmp_path / "hf").fingerprint == smollm2.fingerprint
