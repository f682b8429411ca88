"""An answered prompt, the unit of training data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FeatureSequence:
    """A conversation answered by the target."""

    tokens: Tensor
    """[n] int64: prompt, then answer."""
    features: Tensor
    """[n-1, F] bfloat16 or float32 target features of all tokens but the last."""
    prompt_length: int
    greedy: bool
    """The answer was decoded greedily, so its tokens are the target's own first choices."""
    final: Tensor | None = None
    """[n-1, H]: the target's hidden states after the final norm, where `features` are others."""

    @classmethod
    def of(cls, tokens: Tensor, states: Tensor, count: int, prompt_length: int, greedy: bool) -> FeatureSequence:
        """A sequence from `count` hidden states side by side, [n-1, count * H], of which the last is the teacher."""
        if count < 2:
            return cls(tokens, states, prompt_length, greedy)
        width = states.shape[1] // count * (count - 1)
        return cls(tokens, states[:, :width], prompt_length, greedy, states[:, width:])

    @property
    def teacher(self) -> Tensor:
        """[n-1, H]: the hidden states that the drafter's imitate."""
        return self.features if self.final is None else self.final

    @property
    def roots(self) -> int:
        """Rows that carry a loss; an answer of one token has none."""
        return len(self.tokens) - self.prompt_length - 1
