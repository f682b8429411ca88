"""Names of the networks' inputs and outputs: what emission and binding must agree on.

Shape legend: B rows, T tokens per row, R rows of a call whose logits are wanted, L live K/V entries (those that any
query may read), W in-flight entries, S slots and C capacity of the pool, g key/value heads, d head width, H hidden
width, V target vocabulary, D draft vocabulary, N tree nodes. Floating-point tensors have the network's own type, except
where float32 is said.
"""

from __future__ import annotations

from typing import NamedTuple

TOKENS = "tokens"
"""Input [B, T] int32."""
POSITIONS = "positions"
"""Input [B, T] int32: rotary positions."""
WRITE_INDEX = "write_index"
"""Input [B] int32: the pool entry of each row's first token."""
MASK = "mask"
"""Input [B, 1, T, L]: added to attention scores; `MASKED` forbids."""
PICKED = "picked"
"""Input [B, R] int32: the tokens of each row whose logits are wanted."""
HIDDEN = "hidden"
"""Input of the drafter's networks [B, T, H]: features at step 0, later the drafter's own hidden states. A `standard`
drafter reads none."""
STEP = "step"
"""Input int32 of the step network, when the drafter has several modules: the draft step, [1]; with plugins [B, T], that
of each token."""
SLOTS, LENGTHS = "slots", "lengths"
"""Inputs [B] int32 of the step network with plugins, in place of `WRITE_INDEX`: `TokenBatch.slots` and `.lengths`. Its
pool inputs are the whole pool [S, g, C, d]."""
TREE = "tree"
"""Input [B, T, W] bool of the step network with plugins, in place of `MASK`: `TokenBatch.mask`."""

FEATURES = "features"
"""Output [B, T, H]: what step 0 is fed, for `multi` already fused."""
LOGITS = "logits"
"""Output [B, R, V] or [B, R, D] float32."""
GREEDY = "greedy"
"""Output [B, R] int32: argmax of `LOGITS`."""
NEXT_HIDDEN = "next_hidden"
"""Output of the step network [B, R, H]: the drafter's hidden states of `PICKED`."""
TREE_TOKENS, TREE_PARENTS, TREE_DEPTHS = "tree_tokens", "tree_parents", "tree_depths"
"""Outputs of the round network [B, N] int32, as in `prism_trt.engines.protocol.Tree`."""
TREE_MASK = "tree_mask"
"""Output of the round network [B, N, N] bool."""
TREE_LOG_PROBS = "tree_log_probs"
"""Output of the round network [B, N] float32."""

ROWS, CALL_TOKENS, PICKED_TOKENS, LIVE, IN_FLIGHT = "rows", "tokens", "picked", "live", "in_flight"
"""The dynamic dimensions B, T, R, L and W."""

MASKED = -30000.0
"""Finite in float16, so that rows that may read nothing stay finite; exp of it is 0 in every type."""


class CacheName(NamedTuple):
    """Keys or values of one layer, [B, g, C, d] each: one memory for both tensors."""

    kind: str
    """``keys`` or ``values``."""
    before: str
    """Input."""
    after: str
    """Output."""


def cache_names(layer: int) -> tuple[CacheName, CacheName]:
    """Keys and values of layer `layer`."""
    keys, values = (CacheName(kind, f"{kind}.{layer}", f"{kind}.{layer}.updated") for kind in ("keys", "values"))
    return keys, values
