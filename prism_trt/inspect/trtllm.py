"""What a TensorRT-LLM checkpoint of ours must hold, worked out from its ``config.json`` and its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prism_trt.config import StrictModel, parse
from prism_trt.errors import PrismError
from prism_trt.inspect.report import require
from prism_trt.manifest import own_fields
from prism_trt.trtllm.description import STEP_MAP_KEY
from prism_trt.trtllm.layout import CheckpointOptions, linear_names, padded_vocab
from prism_trt.trtllm.selection import ModuleStack

_AGAIN = "export it again"
Shapes = dict[str, list[int]]


class CheckpointManifest(StrictModel):
    """What `prism_trt.trtllm.export` writes into the manifest."""

    options: CheckpointOptions
    step_map: tuple[int, ...]
    target_fingerprint: str
    drafter_sha256: str


def checkpoint_manifest(manifest: dict[str, Any], path: Path) -> CheckpointManifest:
    """The checkpoint's own fields of its manifest `path`.

    Raises:
        PrismError: one is missing or invalid.
    """
    return parse(CheckpointManifest, own_fields(manifest), str(path))


def checkpoint_facts(manifest: CheckpointManifest) -> dict[str, str]:
    """What to show of it."""
    options = manifest.options
    needed = "needed" if ModuleStack.of(manifest.step_map).needs_selection else "not needed"
    return {
        "EagleNets": f"{options.tree.depth}, modules {list(manifest.step_map)}",
        "largest tree": str(options.tree),
        "ranks": str(options.ranks),
        "dtype": options.dtype,
        "trtllm-build --model_cls_file": needed,
        "target fingerprint": manifest.target_fingerprint,
        "drafter SHA-256": manifest.drafter_sha256,
    }


def require_agreement(config: dict[str, Any], manifest: CheckpointManifest) -> None:
    """Check that ``config.json`` describes what the manifest says.

    Raises:
        PrismError: it does not.
    """
    options = manifest.options
    told = {
        "dtype": options.dtype,
        "num_eagle_layers": options.tree.depth,
        "max_draft_len": options.tree.size - 1,
        "max_non_leaves_per_layer": options.tree.width,
        STEP_MAP_KEY: list(manifest.step_map),
    }
    for field, wanted in told.items():
        found = config.get(field)
        require(found == wanted, f"config.json has {field} {found} and the manifest {wanted}: {_AGAIN}")
    ranks = config.get("mapping", {}).get("tp_size")
    require(ranks == options.ranks, f"config.json is for {ranks} ranks and the manifest {options.ranks}: {_AGAIN}")


def expected_shapes(config: dict[str, Any], options: CheckpointOptions) -> Shapes:
    """Names and shapes of the tensors in each rank's file (see `prism_trt.trtllm.layout`).

    Raises:
        PrismError: ``config.json`` lacks a field.
    """
    try:
        return _shapes(config, options.tree.depth, options.ranks)
    except KeyError as missing:
        raise PrismError(f"config.json lacks {missing}: {_AGAIN}") from None


def _shapes(config: dict[str, Any], depth: int, ranks: int) -> Shapes:
    net = config["eagle_net_config"]
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    head = [padded_vocab(vocab, ranks) // ranks, hidden]
    shapes = {
        "transformer.vocab_embedding.weight": [vocab, hidden],
        "transformer.ln_f.weight": [hidden],
        "lm_head.weight": head,
    }
    for layer in range(config["num_hidden_layers"]):
        shapes |= _layer(config, f"transformer.layers.{layer}", ranks)
        shapes[f"transformer.layers.{layer}.input_layernorm.weight"] = [hidden]
    for step in range(depth):
        name, width = f"eagle_nets.{step}.drafter", net["hidden_size"]
        shapes |= _layer(net, f"{name}.layers.0", ranks)
        shapes |= {
            f"{name}.vocab_embedding.weight": [vocab, hidden],
            f"{name}.fc.weight": [width // ranks, 2 * width],
            f"{name}.fc.bias": [width // ranks],
            f"eagle_nets.{step}.lm_head.weight": head,
        }
    target, nets = linear_names(config["num_hidden_layers"], depth)
    for names, model in ((target, config), (nets, net)):
        if model["quantization"]["quant_algo"] is not None:
            scales = ("weights_scaling_factor", "activation_scaling_factor")
            shapes |= {f"{name}.{scale}": [1] for name in names for scale in scales}
    return shapes


def _layer(model: dict[str, Any], name: str, ranks: int) -> Shapes:
    hidden, inner, width = model["hidden_size"], model["intermediate_size"], model["head_size"]
    queries, keys = model["num_attention_heads"] * width, model["num_key_value_heads"] * width
    return {
        f"{name}.attention.qkv.weight": [(queries + 2 * keys) // ranks, hidden],
        f"{name}.attention.dense.weight": [hidden, queries // ranks],
        f"{name}.mlp.fc.weight": [inner // ranks, hidden],
        f"{name}.mlp.gate.weight": [inner // ranks, hidden],
        f"{name}.mlp.proj.weight": [hidden, inner // ranks],
        f"{name}.post_layernorm.weight": [hidden],
    }


def require_tensors(path: Path, expected: Shapes) -> None:
    """Check names, shapes and values of the tensors in one rank's file.

    Raises:
        PrismError: one is missing, too many, of another shape, or holds values that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
            for name in sorted(expected.keys() | found.keys()):
                held = found.get(name, "missing")
                require(held == expected.get(name), f"{name} is {held}, not {expected.get(name, 'expected')}: {_AGAIN}")
                tensor = file.get_tensor(name)
                finite = torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all()
                require(bool(finite), f"{name} holds infinite or undefined values: {_AGAIN}")
    except (OSError, SafetensorError) as error:
        raise PrismError(f"{path} cannot be read ({error}): {_AGAIN}") from None
