"""Which module a tree token needs: the stack of modules, and depths from the rows of hidden states."""

from __future__ import annotations

import pytest
import torch

from prism_trt.trtllm.selection import ModuleStack, entries_of_tokens


@pytest.mark.parametrize(
    ("step_map", "steps", "entries"),
    [
        ((0,), (), ()),
        ((0, 0, 0), (1,), (0, 0)),
        ((0, 1, 1, 1), (1,), (0, 0, 0)),
        ((0, 1, 2, 1), (1, 2), (0, 1, 0)),
        ((0, 2, 0, 1), (1, 2, 3), (0, 1, 2)),
    ],
)
def test_the_stack_holds_each_module_of_the_tree_once(
    step_map: tuple[int, ...], steps: tuple[int, ...], entries: tuple[int, ...]
) -> None:
    stack = ModuleStack.of(step_map)
    assert (stack.steps, stack.entries) == (steps, entries)
    assert [step_map[stack.steps[entry]] for entry in stack.entries] == list(step_map[1:])
    assert stack.needs_selection == (len(set(step_map[1:])) > 1)


def test_depths_of_tensorrt_llms_own_example() -> None:
    """Case 5 of ``test_prepare_drafter_inputs_plugin.py``: position offsets [0, 0, 1, 1] for these rows and starts."""
    rows, starts = torch.tensor([0, 0, 2, 3]), torch.tensor([0, 2, 4, 0])
    found = entries_of_tokens(rows, [starts[1]], (7, 3), lambda flags: flags.int())
    assert found.tolist() == [7, 7, 3, 3]
