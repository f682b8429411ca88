"""The PRISM drafter: M processing modules, each a fusion layer and one transformer layer.

Shape legend: ... any leading dimensions, H hidden width, h query heads, g key/value heads, d head width, D draft
vocabulary.

A module is given in three pieces, so that training (packed rows, aligned steps) and serving (K/V pool, tree masks)
share every weight and formula and differ only in how they attend: `fuse`, then `qkv` (or `query` and `key_value`), then
`finish`.
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
    """A LLaMA layer without `input_layernorm`, as in EAGLE (section 4.1): the fused input is attended to as it is."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttentionProjections(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)


class ProcessingModule(nn.Module):
    """One processing module: ``x = fc([embed(x_{t+1}), h_t])``, ``x += attention(x)``, ``x += mlp(norm(x))``."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layer = DrafterLayer(config)
        # Not a buffer, because rotary angles must stay float32 when the weights do not.
        self.frequencies = rope_frequencies(config)

    def fuse(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """Fuse embeddings of tokens x_{t+1} with hidden states of positions t, [..., H] each, into [..., H]."""
        return self.fc(torch.cat((embeds, hidden), dim=-1))

    def query(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries [..., h, d] of [..., H] rows at [...] int64 positions."""
        return self._rotate(self._heads(self.layer.self_attn.q_proj(x)), positions)

    def key_value(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values, [..., g, d] each, of [..., H] rows at [...] int64 positions."""
        attention = self.layer.self_attn
        return self._rotate(self._heads(attention.k_proj(x)), positions), self._heads(attention.v_proj(x))

    def qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`query` and `key_value` of the same rows: [..., h, d], [..., g, d], [..., g, d]."""
        return self.query(x, positions), *self.key_value(x, positions)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: rows [..., H] and their attention output [..., h*d] to hidden states [..., H]."""
        x = x + self.layer.self_attn.o_proj(attended)
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions.unsqueeze(-1).float() * self.frequencies.to(x.device)
        return apply_rope(x, angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2))


class Drafter(nn.Module):
    """M processing modules and the draft vocabulary; embedding and head are the target's and are not stored here.

    The position of a row is the index t of its hidden state h_t; its token is x_{t+1}; it predicts x_{t+2}. Logits are
    ``hidden @ lm_head[draft_vocab].T``, without a final norm, because the hidden states imitate the target's after its
    final norm.
    """

    draft_vocab: Tensor | None

    def __init__(self, config: DrafterConfig, draft_vocab: Tensor | None = None) -> None:
        """Modules with PyTorch's default initialisation; `draft_vocab` is [D] int64, strictly ascending."""
        super().__init__()
        size = None if draft_vocab is None else len(draft_vocab)
        if size != config.draft_vocab_size:
            raise ValueError(f"draft_vocab has {size} entries but the config says {config.draft_vocab_size}")
        self.config = config
        self.modules_ = nn.ModuleList(ProcessingModule(config) for _ in range(config.num_modules))
        self.register_buffer("draft_vocab", draft_vocab, persistent=False)

    def module_of_step(self, step: int) -> int:
        """Index sigma(k) of the module that serves draft step `step`; steps past the map use its last entry."""
        return self.config.step_map[min(step, len(self.config.step_map) - 1)]

    def module(self, step: int) -> ProcessingModule:
        """The module that serves draft step `step`."""
        module = self.modules_[self.module_of_step(step)]
        assert isinstance(module, ProcessingModule)
        return module

    def head_rows(self, lm_head: Tensor) -> Tensor:
        """The rows [D, H] of the target's [V, H] head that this drafter predicts with."""
        return lm_head if self.draft_vocab is None else lm_head[self.draft_vocab.to(lm_head.device)]


def copy_modules(drafter: Drafter, num_modules: int, step_map: tuple[int, ...]) -> Drafter:
    """A drafter whose modules are all copies of module 0 of `drafter`: where PRISM tuning starts."""
    config = drafter.config.model_copy(update={"num_modules": num_modules, "step_map": step_map})
    copy = Drafter(type(config).model_validate(config.model_dump()), drafter.draft_vocab)
    for module in copy.modules_:
        module.load_state_dict(drafter.modules_[0].state_dict())
    return copy
