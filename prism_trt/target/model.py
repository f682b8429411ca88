"""The LLaMA-family graph in torch, over an explicit K/V pool or over whole sequences.

Shape legend: B rows, T tokens per row, H hidden width, h query heads, g key/value heads, d head width, C pool entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from prism_trt.config import RopeScaling
from prism_trt.engines.protocol import TokenBatch
from prism_trt.target.config import TargetConfig


class RopeConfig(Protocol):
    """What the rotary embedding needs of a target's or drafter's config."""

    @property
    def head_dim(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeScaling | None: ...


def rope_frequencies(config: RopeConfig) -> Tensor:
    """[d / 2] float32 rotary frequencies; LLaMA-3 rescaling as in `transformers`' ``_compute_llama3_parameters``."""
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rope_tables(config: RopeConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, d / 2] float32 of positions 0..length-1."""
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rope_frequencies(config)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate [..., d] by [..., d / 2] angles that broadcast; halves are paired as in Hugging Face checkpoints."""
    a, b = x.chunk(2, dim=-1)
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., H]."""
        return functional.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H] to [..., H]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class KVPool:
    """Keys and values of every layer and slot: two tensors [layers, slots, g, C, d]."""

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls,
        layers: int,
        slots: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVPool:
        """A pool of zeros."""
        shape = (layers, slots, kv_heads, capacity, head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def move(self, slot: int, source: Tensor, start: int) -> None:
        """Copy entries `source` [n] int64 of a slot to entries start..start+n-1, in every layer."""
        for pool in (self.keys, self.values):
            rows = pool[:, slot]
            rows[:, :, start : start + len(source)] = rows[:, :, source].clone()


@dataclass(frozen=True)
class PoolAccess:
    """How one batch reads and writes a pool; computed once and used by every layer."""

    slots: Tensor
    valid: tuple[Tensor, Tensor]
    """Row and column of every token that is not padding."""
    entries: Tensor
    """[n] pool index of those tokens."""
    window: int
    """Entries any token may read."""
    mask: Tensor
    """[B, 1, T, window] bool."""

    @classmethod
    def of(cls, batch: TokenBatch) -> PoolAccess:
        """Resolve the protocol's rules: committed entries are visible, in-flight ones by mask or causally."""
        rows, tokens = batch.tokens.shape
        device = batch.tokens.device
        steps = torch.arange(tokens, device=device)
        in_flight = batch.offset + tokens
        window = int((batch.lengths + batch.offset + batch.counts).max())
        flight = torch.arange(window, device=device) - batch.lengths[:, None]  # [B, window]
        if batch.mask is None:
            mask = flight[:, None] <= steps[:, None]
        else:
            admitted = batch.mask.gather(2, flight.clamp(0, in_flight - 1)[:, None].expand(-1, tokens, -1))
            mask = (flight < 0)[:, None] | (admitted & (flight < in_flight)[:, None])
        valid = steps < batch.counts[:, None]
        # Padding reads entry 0, since a softmax over nothing is not a number; its output is never used.
        mask = mask & valid[:, :, None] | (~valid[:, :, None] & (flight == -batch.lengths[:, None])[:, None])
        row, column = valid.nonzero(as_tuple=True)
        return cls(batch.slots, (row, column), batch.lengths[row] + batch.offset + column, window, mask[:, None])

    def update(self, pool: KVPool, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, T, g, d] and return the readable window [B, g, window, d] of each row."""
        slots = self.slots[self.valid[0]]
        pool.keys[layer][slots, :, self.entries] = keys[self.valid].to(pool.keys.dtype)
        pool.values[layer][slots, :, self.entries] = values[self.valid].to(pool.values.dtype)
        return pool.keys[layer, self.slots, :, : self.window], pool.values[layer, self.slots, :, : self.window]


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention of [B, T, h, d] over [B, g, C, d] with a bool mask [B, 1, T, C]: [B, T, h*d]."""
    shared = queries.shape[2] // keys.shape[1]
    keys, values = (x.to(queries.dtype).repeat_interleave(shared, dim=1) for x in (keys, values))
    attended = functional.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Projections and rotary embedding of grouped-query attention."""

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def qkv(self, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, T, h, d], rotated keys and values [B, T, g, d]; angles are [B, T, 1, d / 2]."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return apply_rope(q, cosine, sine), apply_rope(k, cosine, sine), v


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer after attention: residuals, second norm and MLP."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers and final norm, named as in Hugging Face checkpoints."""

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaModel(nn.Module):
    """A target. Its state dict has the names of Hugging Face checkpoints; ``lm_head.weight`` only when untied."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_tables()

    def reset_tables(self) -> None:
        """Compute the rotary tables anew; needed after the model was made on the meta device."""
        cosines, sines = rope_tables(self.config, self.config.max_position_embeddings)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, H] rows of the output head."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def head(self, features: Tensor) -> Tensor:
        """Float32 logits [..., V] of features [..., H]."""
        return functional.linear(features, self.head_weight).float()

    def forward(self, batch: TokenBatch, pool: KVPool) -> Tensor:
        """Features [B, T, H] (post final norm) of a batch over the pool; writes its K/V."""
        access = PoolAccess.of(batch)
        cosine, sine = self._angles(batch.positions)
        x = self.model.embed_tokens(batch.tokens)
        for number, layer in enumerate(self.model.layers):
            assert isinstance(layer, DecoderLayer)
            q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cosine, sine)
            keys, values = access.update(pool, number, k, v)
            x = layer.finish(x, attend(q, keys, values, access.mask))
        return self.model.norm(x)

    def forward_sequence(self, tokens: Tensor) -> Tensor:
        """Features [B, T, H] of whole sequences [B, T], causal, without a pool; padding belongs at the end."""
        rows, length = tokens.shape
        cosine, sine = self._angles(torch.arange(length, device=tokens.device).expand(rows, length))
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()[None, None]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            assert isinstance(layer, DecoderLayer)
            q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cosine, sine)
            x = layer.finish(x, attend(q, k.transpose(1, 2), v.transpose(1, 2), mask))
        return self.model.norm(x)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.clamp(max=len(self.cosines) - 1)  # padding may lie past the end
        return self.cosines[positions].unsqueeze(2), self.sines[positions].unsqueeze(2)
