"""Which of the target's hidden states a drafter is fed.

Hidden states are numbered by the layers before them: number i is the residual stream after i layers, as in
``hidden_states[i]`` of `transformers`, and number L, after all L layers, is taken after the final norm.
"""

from __future__ import annotations

from prism_trt.config import DrafterConfig, Features
from prism_trt.target.config import TargetConfig


def multi_layers(num_layers: int) -> tuple[int, int, int]:
    """The three hidden states that `multi` fuses: inputs of layers 2, L/2 and L-3 as in EAGLE-3 (its training code).

    Targets of fewer than six layers give their first, middle and last layer's input.
    """
    if num_layers < 6:
        return (0, num_layers // 2, num_layers - 1)
    return (2, num_layers // 2, num_layers - 3)


def fed_layers(target: TargetConfig, drafter: DrafterConfig | None) -> tuple[int, ...]:
    """Numbers of the hidden states that an engine hands to `drafter`: the last one unless it fuses several."""
    return (drafter.feature_layers if drafter else ()) or (target.num_layers,)


def captured_layers(target: TargetConfig, features: Features) -> tuple[int, ...]:
    """Numbers of the hidden states that training on `features` needs: what is fed, and the last as the teacher."""
    if features == "none":
        return ()
    return (*(multi_layers(target.num_layers) if features == "multi" else ()), target.num_layers)
