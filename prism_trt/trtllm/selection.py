"""Which module's weights a tree token needs when TensorRT-LLM computes its K/V again.

At step k, TensorRT-LLM feeds EagleNet k not only the tokens of depth k but all their ancestors below the root, because
its attention cannot keep a part of a tree (docstring of ``_eagle_fwd_helper``, ``tensorrt_llm/models/eagle/model.py``).
EagleNet k holds module sigma(k), so the ancestors' K/V would come from the wrong module; a token of depth d belongs to
module sigma(d). Nothing here imports TensorRT-LLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class ModuleStack:
    """The modules of steps 1..K-1, each once, in the order of their first step."""

    steps: tuple[int, ...]
    """The first step, from 1 on, of each entry's module: the EagleNet to take its weights from."""
    entries: tuple[int, ...]
    """The entry that tokens of depth 1..K-1 need."""

    @classmethod
    def of(cls, step_map: Sequence[int]) -> ModuleStack:
        """The stack for modules ``step_map[k]`` of steps k = 0..K-1."""
        modules = list(dict.fromkeys(step_map[1:]))
        return cls(
            steps=tuple(step_map.index(module, 1) for module in modules),
            entries=tuple(modules.index(module) for module in step_map[1:]),
        )

    @property
    def needs_selection(self) -> bool:
        """Whether tree tokens need several modules; with one, TensorRT-LLM's own graph computes the right K/V."""
        return len(self.steps) > 1


def entries_of_tokens(rows: Any, starts: Sequence[Any], entries: Sequence[int], as_int32: Callable[[Any], Any]) -> Any:
    """The stack entry [T] int32 of each token of a call.

    Tensors are anything with arithmetic and comparison: those of TensorRT-LLM in the model class, of torch in tests.

    Args:
        rows: [T] int32, where the hidden state that a token is fed lies among those of all steps so far. Those of
            step 0, which the tokens of depth 1 are fed, come first, then those of step 1, and so on.
        starts: the first rows, scalars or [1], of the hidden states of steps 1, 2, ...
        entries: the entry of depth 1, 2, ...; one more than there are `starts`.
        as_int32: converts a comparison's result to 0 and 1.
    """
    chosen = rows * 0 + entries[0]
    for start, (before, entry) in zip(starts, pairwise(entries), strict=True):
        if entry != before:
            chosen = chosen + as_int32(rows > start - 1) * (entry - before)
    return chosen
