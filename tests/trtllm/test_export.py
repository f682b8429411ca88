"""Checkpoints for TensorRT-LLM: their config, their tensors read back, and the drafts of their EagleNets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prism_trt.cli import run
from prism_trt.config import RopeScaling, TreeShape
from prism_trt.drafter.checkpoint import save_drafter
from prism_trt.drafter.model import Drafter
from prism_trt.engines.protocol import EngineLimits, TokenBatch
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.manifest import read_manifest, verify_files
from prism_trt.target.loading import Target, save_hf
from prism_trt.trtllm.app import app
from prism_trt.trtllm.export import KIND, MANIFEST_FILE, export_checkpoint
from prism_trt.trtllm.layout import FP8, CheckpointOptions, LinearScales, linear_names
from prism_trt.trtllm.selection import ModuleStack, entries_of_tokens
from tests.tiny import DRAFTERS, tiny_drafter, tiny_target
from tests.trtllm.stored import StoredNets, layer_state, merge_ranks, read_config

DEPTH = 4
CHAIN = TreeShape(depth=DEPTH, width=1, size=DEPTH + 1)
STEP_MAPS = [(0,), (0, 1), (0, 1, 1), (0, 1, 2), (0, 1, 2, 1), (1, 0, 1)]
PROMPT = 9


def make(step_map: tuple[int, ...] = (0, 1), **target: Any) -> tuple[Target, Drafter]:
    """Models whose weights float16 holds exactly; norms and biases differ between modules, as after training."""
    made = tiny_target(**target)
    drafter = tiny_drafter(made, max(step_map) + 1, step_map=step_map, draft_vocab_size=None, fc_bias=True)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    made.model.half().float()
    return made, drafter.half().float()


def write(directory: Path, made: tuple[Target, Drafter], ranks: int = 1, **options: Any) -> Path:
    out = directory / "checkpoint"
    chosen = CheckpointOptions.model_validate({"tree": CHAIN, "ranks": ranks, **options})
    export_checkpoint(*made, out, chosen, overwrite=True)
    return out


def test_config_holds_what_tensorrt_llm_reads(tmp_path: Path) -> None:
    scaling = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=256)
    made = make((0, 1), rope_theta=5e5, rope_scaling=scaling)
    config = read_config(write(tmp_path, made, ranks=2, dtype="bfloat16", tree=TreeShape.parse("60/10/6")))
    shared = {
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 16,
        "head_dim": 16,
        "hidden_act": "silu",
        "norm_epsilon": 1e-5,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": 512,
        "rotary_base": 5e5,
        "rotary_scaling": {
            "type": "llama3",
            "rope_type": "llama3",
            "factor": 8,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 256,
        },
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
    }
    assert config == {
        **shared,
        "architecture": "EagleForCausalLM",
        "num_hidden_layers": 2,
        "num_eagle_layers": 6,
        "max_draft_len": 59,
        "max_non_leaves_per_layer": 10,
        "eagle_net_config": {**shared, "architecture": "LlamaForCausalLM", "num_hidden_layers": 1},
        "prism_step_map": [0, 1, 1, 1, 1, 1],
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_target_and_drafter_come_back_bit_for_bit(tmp_path: Path, ranks: int, dtype: torch.dtype, tied: bool) -> None:
    target, drafter = make((0, 1, 2), tie_word_embeddings=tied, vocab_size=321)
    out = write(tmp_path, (target, drafter), ranks, dtype=str(dtype).removeprefix("torch."))
    config, stored = read_config(out), merge_ranks(out)

    state = {"model.embed_tokens.weight": stored["transformer.vocab_embedding.weight"]}
    state["model.norm.weight"] = stored["transformer.ln_f.weight"]
    for number in range(target.config.num_layers):
        layer = layer_state(stored, f"transformer.layers.{number}", config)
        state |= {f"model.layers.{number}.{name}": value for name, value in layer.items()}
    if not tied:
        state["lm_head.weight"] = stored["lm_head.weight"][:321]
    assert_same(state, target.model.state_dict(), dtype)

    for step in range(DEPTH):
        net = f"eagle_nets.{step}"
        layer = layer_state(stored, f"{net}.drafter.layers.0", config["eagle_net_config"])
        module = {f"layers.0.{name}": value for name, value in layer.items()}
        module |= {f"fc.{name}": stored[f"{net}.drafter.fc.{name}"] for name in ("weight", "bias")}
        assert_same(module, drafter.module(step).state_dict(), dtype)
        assert torch.equal(stored[f"{net}.drafter.vocab_embedding.weight"], state["model.embed_tokens.weight"])
        assert torch.equal(stored[f"{net}.lm_head.weight"], stored["lm_head.weight"])
    head = torch.nn.functional.pad(target.model.head_weight, (0, 0, 0, ranks - 1)).to(dtype)
    assert torch.equal(stored["lm_head.weight"], head)


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == dtype and torch.equal(state[name], value.to(dtype)), name


def test_a_drafter_without_bias_gets_zeros(tmp_path: Path) -> None:
    target = tiny_target()
    out = write(tmp_path, (target, tiny_drafter(target, draft_vocab_size=None)))
    assert torch.equal(merge_ranks(out)["eagle_nets.1.drafter.fc.bias"], torch.zeros(64, dtype=torch.float16))


def features_and_tokens(target: Target) -> tuple[Tensor, Tensor]:
    """What step 0 is fed: features [T, H] and the tokens [T] that follow them."""
    tokens = torch.randint(0, target.config.vocab_size, (PROMPT + 1,), generator=torch.Generator().manual_seed(3))
    return target.model.forward_sequence(tokens[None, :-1])[0], tokens[1:]


def drafted_by_our_engine(target: Target, drafter: Drafter) -> tuple[list[int], Tensor]:
    """Tokens of a chain, and the logits [K, V] they are the best of."""
    engine = TorchEngine(target, drafter, EngineLimits(1, 32, 32), torch.device("cpu"))
    features, tokens = features_and_tokens(target)
    row = torch.zeros(1, dtype=torch.int64)
    batch = TokenBatch(tokens[None], torch.arange(PROMPT)[None], row, row, row + PROMPT)
    drafted = engine.extend(batch, features[None])
    logits = [drafted.logits[0, 0]]
    for step in range(1, DEPTH):
        batch = TokenBatch(
            tokens=logits[-1].argmax()[None, None],
            positions=row[None] + PROMPT + step - 1,
            slots=row,
            lengths=row + PROMPT,
            counts=row + 1,
            mask=torch.ones(1, 1, step, dtype=torch.bool),
            offset=step - 1,
        )
        drafted = engine.step(step, batch, drafted.hidden)
        logits.append(drafted.logits[0, 0])
    return [int(row.argmax()) for row in logits], torch.stack(logits)


def drafted_by_stored_nets(directory: Path, target: Target) -> tuple[list[int], Tensor]:
    """The same, with net k for step k and every token's K/V kept."""
    nets = StoredNets(directory)
    features, tokens = features_and_tokens(target)
    rows, hidden = nets.run([0] * PROMPT, tokens, features, torch.arange(PROMPT))
    logits = [rows[-1]]
    for step in range(1, DEPTH):
        rows, hidden = nets.run([step], logits[-1].argmax()[None], hidden[-1:], torch.tensor([PROMPT + step - 1]))
        logits.append(rows[-1])
    return [int(row.argmax()) for row in logits], torch.stack(logits)


def drafted_as_tensorrt_llm_does(directory: Path, target: Target, select: bool) -> tuple[list[int], Tensor]:
    """The same, with K/V of all the chain computed again at every step.

    Args:
        select: take a token's weights from the module of its depth, as `prism_trt.trtllm.model_class` does, and not
            from net k.
    """
    nets = StoredNets(directory)
    stack = ModuleStack.of(tuple(nets.config["prism_step_map"]))
    features, tokens = features_and_tokens(target)
    rows, hidden = nets.run([0] * PROMPT, tokens, features, torch.arange(PROMPT))
    logits, fed = [rows[-1]], [hidden[-1]]  # fed: the hidden state that step k made
    for step in range(1, DEPTH):
        nets.drop(PROMPT)
        chain = torch.stack([row.argmax() for row in logits])
        used = [step] * step
        if select:
            # Of one request and chains, step k's only hidden state is row k.
            starts = list(range(1, step))
            entries = entries_of_tokens(torch.arange(step), starts, stack.entries[:step], lambda flags: flags.int())
            used = [stack.steps[entry] for entry in entries]
        rows, hidden = nets.run(used, chain, torch.stack(fed), PROMPT + torch.arange(step))
        logits.append(rows[-1])
        fed.append(hidden[-1])
    return [int(row.argmax()) for row in logits], torch.stack(logits)


@pytest.mark.parametrize("step_map", STEP_MAPS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_stored_nets_draft_what_our_engine_drafts(tmp_path: Path, step_map: tuple[int, ...], ranks: int) -> None:
    made = make(step_map)
    tokens, logits = drafted_by_our_engine(*made)
    stored_tokens, stored_logits = drafted_by_stored_nets(write(tmp_path, made, ranks), made[0])
    assert stored_tokens == tokens
    torch.testing.assert_close(stored_logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("step_map", STEP_MAPS)
def test_computing_kv_again_needs_the_module_of_each_depth(tmp_path: Path, step_map: tuple[int, ...]) -> None:
    made = make(step_map)
    out = write(tmp_path, made)
    _, logits = drafted_by_our_engine(*made)
    _, selected = drafted_as_tensorrt_llm_does(out, made[0], select=True)
    torch.testing.assert_close(selected, logits, atol=1e-4, rtol=1e-4)
    _, plain = drafted_as_tensorrt_llm_does(out, made[0], select=False)
    expanded = tuple(made[1].module_of_step(step) for step in range(DEPTH))
    if ModuleStack.of(expanded).needs_selection:
        assert float((plain - logits).abs().max()) > 0.1
    else:
        torch.testing.assert_close(plain, logits, atol=1e-4, rtol=1e-4)


def scales_for(names: set[str]) -> dict[str, LinearScales]:
    return {name: LinearScales(weight=0.01, activation=0.02) for name in names}


@pytest.mark.parametrize("with_nets", [False, True])
def test_fp8_weights_and_their_scales(tmp_path: Path, with_nets: bool) -> None:
    target, drafter = make()
    of_target, of_nets = linear_names(target.config.num_layers, DEPTH)
    quantised = of_target | of_nets if with_nets else of_target
    out = tmp_path / "fp8"
    options = CheckpointOptions(tree=CHAIN)
    export_checkpoint(target, drafter, out, options, scales_for(quantised))
    export_checkpoint(target, drafter, tmp_path / "plain", options)

    stored, plain = load_file(out / "rank0.safetensors"), load_file(tmp_path / "plain" / "rank0.safetensors")
    for name in quantised:
        weight = stored.pop(f"{name}.weight")
        factors = [stored.pop(f"{name}.{kind}_scaling_factor") for kind in ("weights", "activation")]
        assert weight.dtype == FP8
        assert torch.equal(torch.cat(factors), torch.tensor([0.01, 0.02]))
        # Three bits after the leading one, or the smallest step, 2^-9.
        torch.testing.assert_close(weight.float() * 0.01, plain.pop(f"{name}.weight").float(), rtol=1 / 16, atol=1e-5)
    assert stored.keys() == plain.keys() and all(torch.equal(stored[name], plain[name]) for name in plain)

    config = read_config(out)
    excludes = config["quantization"].pop("exclude_modules")
    assert config["quantization"] == {"quant_algo": "FP8", "kv_cache_quant_algo": None}
    assert "*lm_head" in excludes and ("eagle_nets.*" in excludes) == (not with_nets)
    assert config["eagle_net_config"]["quantization"]["quant_algo"] == ("FP8" if with_nets else None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"transformer.layers.0.mlp.fc": None}, "transformer.layers.0.mlp.fc has no FP8 scales"),
        ({"eagle_nets.0.drafter.fc": 1.0}, "eagle_nets.0.drafter.layers.0.attention.dense has no FP8 scales"),
        ({"lm_head": 1.0}, "FP8 scales for lm_head, which is no linear layer"),
    ],
)
def test_scales_that_do_not_match_are_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    scales = scales_for(linear_names(2, DEPTH)[0])
    for name, value in change.items():
        scales.pop(name, None)
        scales |= {name: LinearScales(weight=value, activation=1)} if value else {}
    with pytest.raises(PrismError, match=sentence):
        export_checkpoint(*make(), tmp_path / "out", CheckpointOptions(tree=CHAIN), scales)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "multi": ("multi", {}, "is fed the last hidden state and this drafter several"),
    "two layers": ("two layers", {}, "are written with one layer and its modules have 2"),
    "standard": ("standard", {}, "a standard drafter is a language model of its own"),
    "draft vocabulary": ("one module", {"draft_vocab_size": 200}, "predicts the whole vocabulary and this drafter 200"),
    "rope": ("one module", {"rope_theta": 5e5}, "gives an EagleNet the target's rope_theta, 10000.0, and this drafter"),
    "K/V heads": ("one module", {"num_kv_heads": 4}, "gives an EagleNet the target's num_kv_heads, 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path, case: str) -> None:
    shape, overrides, sentence = REFUSED[case]
    target = tiny_target()
    drafter = tiny_drafter(target, **{"draft_vocab_size": None, **DRAFTERS[shape], **overrides})
    with pytest.raises(PrismError, match=sentence):
        write(tmp_path, (target, drafter))
    assert not list(tmp_path.iterdir())


def test_targets_with_biases_and_odd_shares_are_refused(tmp_path: Path) -> None:
    biased = tiny_target(qkv_bias=True)
    with pytest.raises(PrismError, match="runs EAGLE on LLaMA alone"):
        write(tmp_path, (biased, tiny_drafter(biased, draft_vocab_size=None)))
    target = tiny_target(num_heads=3, num_kv_heads=3)
    with pytest.raises(PrismError, match="2 ranks cannot share the target's num_heads of 3: pass --ranks 1"):
        write(tmp_path, (target, tiny_drafter(target, draft_vocab_size=None)), ranks=2)


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    target, drafter = make()
    with torch.no_grad():
        target.model.model.norm.weight[0] = 1e6
    with pytest.raises(PrismError, match=r"transformer.ln_f.weight has values .* pass --dtype bfloat16"):
        write(tmp_path, (target, drafter))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("step_map", "said"), [((0, 1), "no --model_cls_file"), ((0, 1, 2), "; --model_cls_file")])
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], step_map: tuple[int, ...], said: str) -> None:
    target, drafter = make(step_map)
    (tmp_path / "target").mkdir()
    save_hf(target, tmp_path / "target")
    save_drafter(drafter, tmp_path / "drafter")
    out = tmp_path / "out"
    arguments = ["export", str(tmp_path / "drafter"), "--target", str(tmp_path / "target"), "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        run(app(), [*arguments, "--tree", "16/4/3", "--ranks", "2"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "2 x 0.00 GB, float16, 3 EagleNets for a tree of 16/4/3" in printed and said in printed

    manifest = read_manifest(out, MANIFEST_FILE, KIND)
    verify_files(out, manifest)
    assert manifest["target_fingerprint"] == target.fingerprint and manifest["step_map"] == [*step_map, 1][:3]
    assert sorted(manifest["files"]) == ["config.json", "rank0.safetensors", "rank1.safetensors"]

    with pytest.raises(SystemExit) as ended:
        run(app(), [*arguments, "--ranks", "3"])
    assert ended.value.code == 2 and "ranks" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["num_eagle_layers"] == 3


def test_model_class_command_prints_an_existing_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(app(), ["model-class"])
    assert Path(capsys.readouterr().out.strip()).is_file()
