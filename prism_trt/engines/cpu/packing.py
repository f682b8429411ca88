"""The weight file of the cpu engine: target and drafter in the order and layout that `csrc/transformer.h` reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prism_trt.target.model import rope_tables

if TYPE_CHECKING:
    from prism_trt.drafter.model import Drafter
    from prism_trt.target.loading import Target

BLOCKS, LANES = 3, 16
GROUP = BLOCKS * LANES
ALIGNMENT = 64


def pack_matrix(weight: Tensor) -> Tensor:
    """Pack [outputs, inputs] into bf16 [groups, inputs / 2, BLOCKS, LANES, 2], outputs padded with zeros."""
    outputs, inputs = weight.shape
    groups = -(-outputs // GROUP)
    padded = torch.zeros(groups * GROUP, inputs, dtype=torch.bfloat16)
    padded[:outputs] = weight.to(torch.bfloat16)
    return padded.view(groups, BLOCKS, LANES, inputs // 2, 2).permute(0, 3, 1, 2, 4).contiguous()


def _block(state: dict[str, Tensor], prefix: str, input_norm: bool, bias: bool) -> Iterator[Tensor]:
    if input_norm:
        yield state[f"{prefix}.input_layernorm.weight"].float()
    attention = f"{prefix}.self_attn"
    yield pack_matrix(torch.cat([state[f"{attention}.{name}_proj.weight"] for name in "qkv"]))
    if bias:
        yield torch.cat([state[f"{attention}.{name}_proj.bias"] for name in "qkv"]).float()
    yield pack_matrix(state[f"{attention}.o_proj.weight"])
    yield state[f"{prefix}.post_attention_layernorm.weight"].float()
    for name in ("gate", "up", "down"):
        yield pack_matrix(state[f"{prefix}.mlp.{name}_proj.weight"])


def packed_tensors(target: Target, drafter: Drafter | None, context: int) -> Iterator[Tensor]:
    """Every tensor of the weight file in order; produced one at a time so that memory holds one packed copy only."""
    config = target.config
    state = target.model.state_dict()
    embedding = state["model.embed_tokens.weight"]
    head = embedding if config.tie_word_embeddings else state["lm_head.weight"]
    yield embedding.to(torch.bfloat16)
    yield torch.cat(rope_tables(config, context), dim=-1).float()
    for layer in range(config.num_layers):
        yield from _block(state, f"model.layers.{layer}", input_norm=True, bias=config.qkv_bias)
    yield state["model.norm.weight"].float()
    yield pack_matrix(head)
    if drafter is None:
        return
    draft_state = drafter.state_dict()
    yield torch.cat(rope_tables(drafter.config, context), dim=-1).float()
    is_lm = drafter.config.kind == "standard"
    if is_lm:
        yield draft_state["embed_tokens.weight"].to(torch.bfloat16)
    if drafter.fusion is not None:
        yield pack_matrix(draft_state["fusion.weight"])
    for module in range(drafter.config.num_modules):
        prefix = f"modules_.{module}"
        if not is_lm:
            yield pack_matrix(draft_state[f"{prefix}.fc.weight"])
        if drafter.config.fc_bias and not is_lm:
            yield draft_state[f"{prefix}.fc.bias"].float()
        for layer in range(drafter.config.num_layers):
            yield from _block(draft_state, f"{prefix}.layers.{layer}", input_norm=is_lm or layer > 0, bias=False)
        if is_lm:
            yield draft_state[f"{prefix}.norm.weight"].float()
    yield pack_matrix(drafter.head_rows(head))


def write_weights(path: Path, tensors: Iterator[Tensor]) -> None:
    """Write each tensor's bytes to `path`, padded to 64-byte boundaries."""
    with path.open("wb") as file:
        for tensor in tensors:
            data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
            file.write(data)
            file.write(bytes(-len(data) % ALIGNMENT))
