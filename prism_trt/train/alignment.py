"""The drafter run over packed sequences as it runs when it serves: training-time alignment (HASS, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_trt.drafter.model import Drafter
from prism_trt.train.attention import joint_attention
from prism_trt.train.batch import PackedBatch


def aligned_steps(
    drafter: Drafter,
    embedding: Tensor,
    batch: PackedBatch,
    steps: int,
    detach: bool = False,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Hidden states [N, H] of draft steps 0 .. steps-1 at every root of `batch`, on the batch's own tokens.

    Rows of step k whose root has ``remaining < k`` are meaningless and must be masked by the caller.

    Args:
        embedding: [V, H] the target's embedding table, in the dtype that features are read in.
        detach: stop the gradient between steps, as HASS does; without it, it flows back through every step (PRISM stage
            2).
        noise: half-width of the uniform noise added to the target features that step 0 reads.
        generator: source of that noise.
    """
    features = torch.cat((batch.prompt_features, batch.root_features)).to(embedding.dtype)
    if noise:
        spread = torch.empty(features.shape, dtype=features.dtype).uniform_(-noise, noise, generator=generator)
        features = features + spread
    prompts = len(batch.prompt_tokens)
    module = drafter.module(0)
    x = module.fuse(embedding[torch.cat((batch.prompt_tokens, batch.root_tokens))], features)
    keys, values = module.key_value(x, torch.cat((batch.prompt_positions, batch.root_positions)))
    prompt_kv, root_kv = (keys[:prompts], values[:prompts]), (keys[prompts:], values[prompts:])

    x = x[prompts:]
    own_steps: list[tuple[Tensor, Tensor]] = []
    hidden: list[Tensor] = []
    for step in range(steps):
        positions = batch.root_positions + step
        if step:
            module = drafter.module(step)
            previous = hidden[-1].detach() if detach else hidden[-1]
            x = module.fuse(embedding[batch.root_tokens.roll(-step)], previous)
            own_steps.append(module.key_value(x, positions))
        attended = joint_attention(batch.spans, module.query(x, positions), prompt_kv, root_kv, own_steps)
        hidden.append(module.finish(x, attended))
    return hidden
