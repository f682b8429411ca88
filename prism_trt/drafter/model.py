"""The drafters: M processing modules, each a fusion layer and transformer layers, or one small language model.

Shape legend: ... any leading dimensions, H hidden width, F feature width, h query heads, g key/value heads, d head
width, V vocabulary, D draft vocabulary.

A layer is given in pieces, so that training (packed rows, aligned steps) and serving (K/V pool, tree masks) share every
weight and formula and differ only in how they attend: `input_layernorm`, then `query` and `key_value`, then `finish`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prism_trt.config import DrafterConfig
from prism_trt.target.model import MLP, RMSNorm, apply_rope, rope_frequencies


class SelfAttentionProjections(nn.Module):
    """The four projections of grouped-query attention, without biases."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)


class DrafterLayer(nn.Module):
    """A LLaMA layer. The first of a processing module has no `input_layernorm`, as in EAGLE (section 4.1)."""

    def __init__(self, config: DrafterConfig, input_norm: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if input_norm else nn.Identity()
        self.self_attn = SelfAttentionProjections(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        # Not a buffer, because rotary angles must stay float32 when the weights do not.
        self.frequencies = rope_frequencies(config)

    def query(self, normed: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries [..., h, d] of [..., H] normed rows at [...] int64 positions."""
        return self._rotate(self._heads(self.self_attn.q_proj(normed)), positions)

    def key_value(self, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values, [..., g, d] each, of [..., H] normed rows at [...] int64 positions."""
        attention = self.self_attn
        return self._rotate(self._heads(attention.k_proj(normed)), positions), self._heads(attention.v_proj(normed))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: rows [..., H] and their attention output [..., h*d] to hidden states [..., H]."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions.unsqueeze(-1).float() * self.frequencies.to(x.device)
        return apply_rope(x, angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2))


class ProcessingModule(nn.Module):
    """One processing module: ``x = fc([embed(x_{t+1}), h_t])``, then its layers.

    The one module of a `standard` drafter has no fc (``x = embed(x_{t+1})``), but a norm before every layer and at the
    end, as any LLaMA model.
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        is_lm = config.kind == "standard"
        self.fc = None if is_lm else nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        layers = (DrafterLayer(config, input_norm=is_lm or number > 0) for number in range(config.num_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if is_lm else nn.Identity()

    @property
    def stack(self) -> list[DrafterLayer]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, DrafterLayer)]

    def fuse(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """The layers' input [..., H]: embeddings of tokens x_{t+1} fused with hidden states of positions t."""
        return embeds if self.fc is None else self.fc(torch.cat((embeds, hidden), dim=-1))


class Drafter(nn.Module):
    """M processing modules and the draft vocabulary.

    The position of a row is the index t of its hidden state h_t; its token is x_{t+1}; it predicts x_{t+2}. Logits are
    ``hidden @ lm_head[draft_vocab].T``, without a final norm, because the hidden states imitate the target's after its
    final norm. Embedding and head are the target's and are not stored here, except in a `standard` drafter, which has
    its own: ``embed_tokens`` [V, H] and ``lm_head`` [D, H].
    """

    draft_vocab: Tensor | None

    def __init__(self, config: DrafterConfig, draft_vocab: Tensor | None = None, vocab_size: int | None = None) -> None:
        """Modules with PyTorch's default initialisation.

        Args:
            draft_vocab: [D] int64, strictly ascending.
            vocab_size: V, which a `standard` drafter needs for its tables.
        """
        super().__init__()
        size = None if draft_vocab is None else len(draft_vocab)
        if size != config.draft_vocab_size:
            raise ValueError(f"draft_vocab has {size} entries but the config says {config.draft_vocab_size}")
        self.config = config
        self.modules_ = nn.ModuleList(ProcessingModule(config) for _ in range(config.num_modules))
        self.fusion = None
        if config.features == "multi":
            self.fusion = nn.Linear(len(config.feature_layers) * config.hidden_size, config.hidden_size, bias=False)
        self.embed_tokens = self.lm_head = None
        if config.kind == "standard":
            if vocab_size is None:
                raise ValueError("a standard drafter needs vocab_size")
            self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
            self.lm_head = nn.Linear(config.hidden_size, size or vocab_size, bias=False)
        self.register_buffer("draft_vocab", draft_vocab, persistent=False)

    def module_of_step(self, step: int) -> int:
        """Index sigma(k) of the module that serves draft step `step`; steps past the map use its last entry."""
        return self.config.step_map[min(step, len(self.config.step_map) - 1)]

    def module(self, step: int) -> ProcessingModule:
        """The module that serves draft step `step`."""
        module = self.modules_[self.module_of_step(step)]
        assert isinstance(module, ProcessingModule)
        return module

    def fuse_features(self, features: Tensor) -> Tensor:
        """What step 0 reads as h_t [..., H]: the features [..., F] themselves, or three of them fused (PRISM*)."""
        if self.fusion is None:
            return features
        if self.config.normalize_features:
            states = features.unflatten(-1, (-1, self.config.hidden_size))
            features = nn.functional.rms_norm(states, states.shape[-1:], eps=self.config.rms_norm_eps).flatten(-2)
        return self.fusion(features)

    def embedding(self, target_embedding: Tensor) -> Tensor:
        """The table [V, H] that tokens are read with: the target's, given here, or the drafter's own."""
        return target_embedding if self.embed_tokens is None else self.embed_tokens.weight

    def head_rows(self, lm_head: Tensor) -> Tensor:
        """The rows [D, H] that this drafter predicts with: of the target's [V, H] head, or its own."""
        if self.lm_head is not None:
            return self.lm_head.weight
        return lm_head if self.draft_vocab is None else lm_head[self.draft_vocab.to(lm_head.device)]


def copy_modules(drafter: Drafter, num_modules: int, step_map: tuple[int, ...]) -> Drafter:
    """A drafter whose modules are all copies of module 0 of `drafter`: where PRISM tuning starts."""
    values = drafter.config.model_dump() | {"kind": "prism", "num_modules": num_modules, "step_map": step_map}
    copy = Drafter(DrafterConfig.model_validate(values), drafter.draft_vocab)
    for module in copy.modules_:
        module.load_state_dict(drafter.modules_[0].state_dict())
    if copy.fusion is not None and drafter.fusion is not None:
        copy.fusion.load_state_dict(drafter.fusion.state_dict())
    return copy
