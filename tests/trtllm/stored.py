"""A TensorRT-LLM checkpoint read back, and its EagleNets run in plain torch: written apart from the exporter.

Names and formulas are those of TensorRT-LLM's ``models/eagle/model.py``, ``models/llama/model.py`` and ``layers``.
Shape legend: T tokens, H hidden width, h query heads, g key/value heads, d head width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

COLUMN = ("attention.qkv.weight", "mlp.fc.weight", "mlp.gate.weight", "drafter.fc.weight", "fc.bias", "lm_head.weight")
ROW = ("attention.dense.weight", "mlp.proj.weight")


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's ``config.json``."""
    return json.loads((directory / "config.json").read_text())


def merge_ranks(directory: Path) -> dict[str, Tensor]:
    """Whole tensors from the ranks' shares, with q, k, v of each rank in turn sorted into one q, k, v."""
    config = read_config(directory)
    ranks = [load_file(directory / f"rank{rank}.safetensors") for rank in range(config["mapping"]["tp_size"])]
    assert all(rank.keys() == ranks[0].keys() for rank in ranks)
    merged = {}
    for name in ranks[0]:
        shares = [rank[name] for rank in ranks]
        if name.endswith(ROW):
            merged[name] = torch.cat(shares, dim=1)
        elif name.endswith("attention.qkv.weight"):
            sizes = qkv_sizes(config if name.startswith("transformer.") else config["eagle_net_config"])
            parts = [share.split([size // len(ranks) for size in sizes]) for share in shares]
            merged[name] = torch.cat([part for kind in zip(*parts, strict=True) for part in kind])
        elif name.endswith(COLUMN):
            merged[name] = torch.cat(shares)
        else:
            assert all(torch.equal(share, shares[0]) for share in shares)
            merged[name] = shares[0]
    return merged


def qkv_sizes(config: dict[str, Any]) -> list[int]:
    """Rows of q, k and v."""
    groups = config["num_key_value_heads"] * config["head_size"]
    return [config["num_attention_heads"] * config["head_size"], groups, groups]


def layer_state(tensors: dict[str, Tensor], name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """A layer's tensors by their Hugging Face names."""
    q, k, v = tensors[f"{name}.attention.qkv.weight"].split(qkv_sizes(config))
    state = {
        "self_attn.q_proj.weight": q,
        "self_attn.k_proj.weight": k,
        "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": tensors[f"{name}.attention.dense.weight"],
        "mlp.gate_proj.weight": tensors[f"{name}.mlp.fc.weight"],
        "mlp.up_proj.weight": tensors[f"{name}.mlp.gate.weight"],
        "mlp.down_proj.weight": tensors[f"{name}.mlp.proj.weight"],
        "post_attention_layernorm.weight": tensors[f"{name}.post_layernorm.weight"],
    }
    if (norm := f"{name}.input_layernorm.weight") in tensors:
        state["input_layernorm.weight"] = tensors[norm]
    return state


class StoredNets:
    """The EagleNets of one checkpoint and the K/V they have in common, for one request."""

    def __init__(self, directory: Path) -> None:
        self.config = read_config(directory)
        self.net = self.config["eagle_net_config"]
        self.tensors = {name: value.float() for name, value in merge_ranks(directory).items()}
        self.keys = self.values = torch.empty(0)
        self.drop(0)

    def drop(self, length: int) -> None:
        """Forget K/V from entry `length` on."""
        shape = (0, self.net["num_key_value_heads"], self.net["head_size"])
        self.keys = self.keys[:length] if length else torch.empty(shape)
        self.values = self.values[:length] if length else torch.empty(shape)

    def run(self, nets: Sequence[int], tokens: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Run [T] `tokens`, each through the weights of its net of `nets`, and add their K/V.

        Args:
            hidden: [T, H] fed with the tokens.
            positions: [T] rotary positions; the tokens are a chain.

        Returns:
            Logits [T, V] of the last token's net's head, and hidden states [T, H].
        """

        def linear(name: str, x: Tensor) -> Tensor:
            weights = (self._tensor(net, f"drafter.{name}.weight") for net in nets)
            return torch.stack([weight @ row for weight, row in zip(weights, x, strict=True)])

        embeds = torch.stack(
            [self._tensor(net, "drafter.vocab_embedding.weight")[t] for net, t in zip(nets, tokens, strict=True)]
        )
        biases = torch.stack([self._tensor(net, "drafter.fc.bias") for net in nets])
        x = linear("fc", torch.cat((embeds, hidden), dim=-1)) + biases
        q, k, v = linear("layers.0.attention.qkv", x).split(qkv_sizes(self.net), dim=-1)
        width = self.net["head_size"]
        self.keys = torch.cat((self.keys, self._rotated(k.unflatten(-1, (-1, width)), positions)))
        self.values = torch.cat((self.values, v.unflatten(-1, (-1, width))))
        x = x + linear("layers.0.attention.dense", self._attend(self._rotated(q.unflatten(-1, (-1, width)), positions)))
        norms = torch.stack([self._tensor(net, "drafter.layers.0.post_layernorm.weight") for net in nets])
        normed = x * (x.square().mean(-1, keepdim=True) + self.net["norm_epsilon"]).rsqrt() * norms
        gated = functional.silu(linear("layers.0.mlp.fc", normed)) * linear("layers.0.mlp.gate", normed)
        x = x + linear("layers.0.mlp.proj", gated)
        return x @ self._tensor(nets[-1], "lm_head.weight").T, x

    def _tensor(self, net: int, name: str) -> Tensor:
        return self.tensors[f"eagle_nets.{net}.{name}"]

    def _attend(self, queries: Tensor) -> Tensor:
        """[T, h * d]: the last T entries' queries [T, h, d] over all entries before and themselves."""
        shared = self.net["num_attention_heads"] // self.net["num_key_value_heads"]
        keys, values = (entries.repeat_interleave(shared, dim=1) for entries in (self.keys, self.values))
        scores = torch.einsum("thd,chd->htc", queries, keys) / self.net["head_size"] ** 0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(keys) - len(queries))
        weights = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
        return torch.einsum("htc,chd->thd", weights, values).flatten(1)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        half = self.net["head_size"] // 2
        angles = positions[:, None, None] * self.net["rotary_base"] ** -(torch.arange(half) / half)
        a, b = x.split(half, dim=-1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)
