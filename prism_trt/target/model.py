"""The LLaMA-family graph in torch, over an explicit K/V pool or over whole sequences.

Shape legend: B rows, T tokens per row, H hidden width, h query heads, g key/value heads, d head width, C pool entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from prism_trt.config import RopeScaling
from prism_trt.engines.protocol import TokenBatch
from prism_trt.errors import PrismError
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
            pool[:, slot, :, start : start + len(source)] = pool[:, slot, :, source]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of slot `source` to slot `target`, in every layer."""
        for pool in (self.keys, self.values):
            pool[:, target, :, :length] = pool[:, source, :, :length]


@dataclass(frozen=True)
class PoolAccess:
    """How one batch reads and writes a pool; resolved once and used by every layer."""

    slots: slice | Tensor
    """The slot of each row; a slice when they are consecutive, because reading then copies nothing."""
    span: slice | None
    """Entries that every row writes, when they are the same for all and `slots` is a slice."""
    scatter: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """Otherwise: row, column, slot and entry [n] of every token that is not padding."""
    window: int
    """Entries any token may read."""
    mask: Tensor | None
    """[B, 1, T, window] bool; None when every token reads the whole window."""

    @classmethod
    def of(cls, batch: TokenBatch, pool: KVPool) -> PoolAccess:
        """Resolve the rules of `prism_trt.engines.protocol`.

        Raises:
            PrismError: a token lies outside the pool's capacity.
            ValueError: two rows share a slot, or a slot is not in the pool.
        """
        table = torch.stack((batch.slots, batch.lengths, batch.counts))  # one transfer from the device, not three
        slots, lengths, counts = table.tolist()
        _, pool_slots, _, capacity, _ = pool.keys.shape
        if len(set(slots)) < len(slots):
            raise ValueError(f"two rows of a call share a slot: {slots}")
        if min(slots) < 0 or max(slots) >= pool_slots:
            raise ValueError(f"the pool has {pool_slots} slots, but a call names the slots {slots}")
        tokens = batch.tokens.shape[1]
        window = batch.offset + max(length + count for length, count in zip(lengths, counts, strict=True))
        if window > capacity:
            raise PrismError(
                f"the call needs {window} K/V entries but the context has {capacity}: shorten the prompt or build the "
                "engine with a larger context"
            )
        consecutive = slots == list(range(slots[0], slots[0] + len(slots)))
        full = min(counts) == tokens
        same = full and min(lengths) == max(lengths)
        start = lengths[0] + batch.offset
        in_place = consecutive and same
        return cls(
            slots=slice(slots[0], slots[0] + len(slots)) if consecutive else batch.slots,
            span=slice(start, start + tokens) if in_place else None,
            scatter=None if in_place else _scatter(batch),
            window=window,
            mask=None if same and tokens == 1 and batch.mask is None else _readable(batch, window, full),
        )

    def update(self, pool: KVPool, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values [B, T, g, d] and return the readable window [B, g, window, d] of each row."""
        for entries, new in ((pool.keys[layer], keys), (pool.values[layer], values)):
            if self.scatter is None:
                entries[self.slots, :, self.span] = new.transpose(1, 2)
            else:
                row, column, slot, entry = self.scatter
                entries[slot, :, entry] = new[row, column]
        return pool.keys[layer, self.slots, :, : self.window], pool.values[layer, self.slots, :, : self.window]


def _scatter(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    row, column = (columns < batch.counts[:, None]).nonzero(as_tuple=True)
    return row, column, batch.slots[row], batch.lengths[row] + batch.offset + column


def _readable(batch: TokenBatch, window: int, full: bool) -> Tensor:
    """[B, 1, T, window] bool: committed entries, and those in flight that the mask admits (causally without one)."""
    device = batch.tokens.device
    tokens = batch.tokens.shape[1]
    columns = torch.arange(tokens, device=device)
    flight = torch.arange(window, device=device) - batch.lengths[:, None]  # [B, window], negative when committed
    if batch.mask is None:
        return (flight[:, None] <= columns[:, None])[:, None]
    last = batch.mask.shape[2] - 1
    admitted = batch.mask.gather(2, flight.clamp(0, last)[:, None].expand(-1, tokens, -1))
    mask = (flight < 0)[:, None] | (admitted & (flight <= last)[:, None])
    if not full:  # padding reads everything, since a softmax over nothing is not a number
        mask = mask | (columns >= batch.counts[:, None])[:, :, None]
    return mask[:, None]


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention of [B, T, h, d] over [B, g, C, d]: [B, T, h * d].

    Args:
        mask: [B or 1, 1, T, C] bool; None reads everything.
    """
    rows, tokens, heads, width = queries.shape
    groups = keys.shape[1]
    shared = heads // groups
    # Query heads that share a key head become further rows of it: keys and values are not repeated.
    folded = queries.view(rows, tokens, groups, shared, width).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(rows, groups, shared * tokens, width)
    if mask is not None and shared > 1:
        mask = mask.repeat(1, 1, shared, 1)
    attended = functional.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    attended = attended.view(rows, groups, shared, tokens, width).permute(0, 3, 1, 2, 4)
    return attended.reshape(rows, tokens, heads * width)


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

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Not a buffer, because rotary angles must stay float32 when the weights do not.
        self.frequencies = rope_frequencies(config)

    @classmethod
    def from_state(cls, config: TargetConfig, state: dict[str, Tensor]) -> LlamaModel:
        """A frozen model that shares the tensors of a complete state dict and is on their device."""
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state, assign=True)
        model.frequencies = rope_frequencies(config).to(state["model.norm.weight"].device)
        return model.requires_grad_(False).eval()

    @property
    def head_weight(self) -> Tensor:
        """[V, H] rows of the output head."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def head(self, features: Tensor) -> Tensor:
        """Float32 logits [..., V] of features [..., H]."""
        return functional.linear(features, self.head_weight).float()

    def forward(self, batch: TokenBatch, pool: KVPool, feature_layers: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Run a batch over the pool, writing its K/V.

        Args:
            feature_layers: numbers of the hidden states wanted (see `prism_trt.drafter.features`); none for the last.

        Returns:
            The hidden states [B, T, H] after the final norm, and the features [B, T, F]: the wanted hidden states side
            by side.

        Raises:
            PrismError: a token lies outside the pool's capacity.
            ValueError: two rows share a slot, or a slot is not in the pool.
        """
        return self.forward_resolved(batch.tokens, batch.positions, PoolAccess.of(batch, pool), pool, feature_layers)

    def forward_resolved(
        self, tokens: Tensor, positions: Tensor, access: PoolAccess, pool: KVPool, feature_layers: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """`forward` of tokens [B, T] at positions [B, T] whose access to the pool is resolved already."""
        cosine, sine = self._angles(positions)

        def attention(number: int, layer: DecoderLayer, x: Tensor) -> Tensor:
            q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cosine, sine)
            keys, values = access.update(pool, number, k, v)
            return attend(q, keys, values, access.mask)

        return self._run(tokens, attention, feature_layers)

    def forward_sequence(self, tokens: Tensor, feature_layers: Sequence[int] = ()) -> Tensor:
        """Features [B, T, F] of whole sequences [B, T], causal, without a pool; padding belongs at the end."""
        length = tokens.shape[1]
        cosine, sine = self._angles(torch.arange(length, device=tokens.device)[None])
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()[None, None]

        def attention(number: int, layer: DecoderLayer, x: Tensor) -> Tensor:
            q, k, v = layer.self_attn.qkv(layer.input_layernorm(x), cosine, sine)
            return attend(q, k.transpose(1, 2), v.transpose(1, 2), mask)

        return self._run(tokens, attention, feature_layers)[1]

    def _run(
        self, tokens: Tensor, attention: Callable[[int, DecoderLayer, Tensor], Tensor], feature_layers: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        x = self.model.embed_tokens(tokens)
        states = [x]
        for number, layer in enumerate(self.model.layers):
            assert isinstance(layer, DecoderLayer)
            x = layer.finish(x, attention(number, layer, x))
            states.append(x)
        states[-1] = final = self.model.norm(x)
        return final, torch.cat([states[i] for i in feature_layers], dim=-1) if feature_layers else final

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., 1, d / 2] of [...] positions, in the dtype of the weights."""
        angles = (positions.unsqueeze(-1).float() * self.frequencies.to(positions.device)).unsqueeze(-2)
        dtype = self.model.norm.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)
