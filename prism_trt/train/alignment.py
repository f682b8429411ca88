"""The drafter run over packed sequences as it runs when it serves: training-time alignment (HASS, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from prism_trt.drafter.model import Drafter, DrafterLayer, ProcessingModule
from prism_trt.train.attention import joint_attention
from prism_trt.train.batch import PackedBatch, SequenceSpan

KeyValue = tuple[Tensor, Tensor]


@dataclass
class _LayerPool:
    """What one layer's K/V pool holds: entries of true features, and of each root's own draft steps."""

    prompt_kv: KeyValue
    root_kv: KeyValue
    own_steps: list[KeyValue] = field(default_factory=list)


def aligned_steps(
    drafter: Drafter,
    embedding: Tensor,
    batch: PackedBatch,
    steps: int,
    detach: bool = False,
    noise: Tensor | None = None,
) -> list[Tensor]:
    """Hidden states [N, H] of draft steps 0 .. steps-1 at every root of `batch`, on the batch's own tokens.

    Rows of step k whose root has ``remaining < k`` are meaningless and must be masked by the caller.

    With K/V mode `producer` every entry keeps the K/V of the module that wrote it, as it does when serving. With
    `current`, as the PRISM artifact trains, module sigma(k) writes all K/V that step k reads.

    Args:
        embedding: [V, H] the target's embedding table, in the dtype that features are read in.
        detach: stop the gradient between steps, as HASS does; without it, it flows back through every step (PRISM stage
            2).
        noise: [P + N, F] added to the target features that step 0 reads (see `feature_noise`).
    """
    features = torch.cat((batch.prompt_features, batch.root_features)).to(embedding.dtype)
    if noise is not None:
        features = features + noise
    table = drafter.embedding(embedding)
    embeds = functional.embedding(torch.cat((batch.prompt_tokens, batch.root_tokens)), table)
    root_embeds = embeds[len(batch.prompt_tokens) :]
    fused = drafter.fuse_features(features)

    module = drafter.module(0)
    states, pools = _first_step(module, module.fuse(embeds, fused), batch)
    hidden = [states]
    inputs: list[Tensor] = []  # of steps 1, 2, ...: the hidden states that were fed
    for step in range(1, steps):
        inputs.append(hidden[-1].detach() if detach else hidden[-1])
        previous, module = module, drafter.module(step)
        first = step
        if drafter.config.kv_mode == "current" and module is not previous:
            pools, first = [_context_pool(module.stack[0], module.fuse(embeds, fused), batch)], 1
        for own in range(first, step + 1):
            x = module.fuse(root_embeds.roll(-own, 0), inputs[own - 1])
            if own < step:
                pools[0].own_steps.append(module.stack[0].key_value(x, batch.root_positions + own))
        hidden.append(_own_step(module, x, batch.root_positions + step, batch.spans, pools))
    return hidden


def feature_noise(batch: PackedBatch, half_width: float, seeds: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uniform noise [P + N, F] on the CPU, each sequence's from a seed of its own.

    So a sequence gets the same noise in whatever part of an update, and on whatever rank, it is.
    """
    parts = []
    for span, seed in zip(batch.spans, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        shape = (span.prompts + span.roots, batch.root_features.shape[1])
        parts.append(torch.empty(shape, dtype=dtype).uniform_(-half_width, half_width, generator=generator))
    prompts = [part[: span.prompts] for part, span in zip(parts, batch.spans, strict=True)]
    roots = [part[span.prompts :] for part, span in zip(parts, batch.spans, strict=True)]
    return torch.cat(prompts + roots)


def _first_step(module: ProcessingModule, x: Tensor, batch: PackedBatch) -> tuple[Tensor, list[_LayerPool]]:
    """Step 0 over prompt rows and roots, [P + N, H]: the roots' hidden states [N, H] and every layer's pool."""
    prompts = len(batch.prompt_tokens)
    pools = []
    for number, layer in enumerate(module.stack):
        normed = layer.input_layernorm(x)
        pool = _context_pool(layer, normed, batch)
        pools.append(pool)
        attended = joint_attention(
            batch.spans, layer.query(normed[prompts:], batch.root_positions), pool.prompt_kv, pool.root_kv, []
        )
        if number + 1 < len(module.layers):
            # The next layer's K/V of the prompt needs the prompt's rows as well.
            alone = tuple(SequenceSpan(0, 0, span.prompt_start, span.prompts) for span in batch.spans if span.prompts)
            nothing = (pool.prompt_kv[0][:0], pool.prompt_kv[1][:0])
            query = layer.query(normed[:prompts], batch.prompt_positions)
            x = layer.finish(x, torch.cat((joint_attention(alone, query, nothing, pool.prompt_kv, []), attended)))
        else:
            x = layer.finish(x[prompts:], attended)
    return module.norm(x), pools


def _context_pool(layer: DrafterLayer, normed: Tensor, batch: PackedBatch) -> _LayerPool:
    """The K/V that `layer` writes for prompt rows and roots, [P + N, H]."""
    prompts = len(batch.prompt_tokens)
    keys, values = layer.key_value(normed, torch.cat((batch.prompt_positions, batch.root_positions)))
    return _LayerPool((keys[:prompts], values[:prompts]), (keys[prompts:], values[prompts:]))


def _own_step(
    module: ProcessingModule, x: Tensor, positions: Tensor, spans: tuple[SequenceSpan, ...], pools: list[_LayerPool]
) -> Tensor:
    """A step k >= 1 of every root: `x` [N, H] at `positions` [N] through the layers, adding to their pools."""
    for layer, pool in zip(module.stack, pools, strict=True):
        normed = layer.input_layernorm(x)
        pool.own_steps.append(layer.key_value(normed, positions))
        query = layer.query(normed, positions)
        x = layer.finish(x, joint_attention(spans, query, pool.prompt_kv, pool.root_kv, pool.own_steps))
    return module.norm(x)
