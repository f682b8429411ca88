from __future__ import annotations

import torch

from prism_trt.data.sequences import FeatureSequence
from prism_trt.train.batch import pack


def sequence(prompt: int, answer: int, base: int) -> FeatureSequence:
    """Token t of the sequence is base + t, and so is its feature."""
    tokens = torch.arange(base, base + prompt + answer)
    return FeatureSequence(tokens, tokens[:-1, None].float(), prompt, True)


def test_rows_hold_what_the_drafter_sees_when_it_serves() -> None:
    batch = pack([sequence(3, 4, 100), sequence(1, 2, 200)])
    # The first sequence is x_0..x_6 with features h_0..h_5; rounds start at rows 2, 3, 4: after the prompt's last token
    # until the last row whose teacher h_{r+1} exists.
    assert batch.root_positions.tolist() == [2, 3, 4, 0]
    assert batch.root_features[:, 0].tolist() == [102, 103, 104, 200]
    assert batch.root_tokens.tolist() == [103, 104, 105, 201]
    assert batch.teacher_features[:, 0].tolist() == [103, 104, 105, 201]
    assert batch.next_tokens.tolist() == [104, 105, 106, 202]
    assert batch.remaining.tolist() == [2, 1, 0, 0]
    assert batch.prompt_positions.tolist() == [0, 1]
    assert batch.prompt_features[:, 0].tolist() == [100, 101]
    assert batch.prompt_tokens.tolist() == [101, 102]
    assert [(s.prompt_start, s.prompts, s.root_start, s.roots) for s in batch.spans] == [(0, 2, 0, 3), (2, 0, 3, 1)]


def test_a_later_step_is_a_shift() -> None:
    batch = pack([sequence(2, 5, 0)])
    step = 2
    exists = batch.remaining >= step
    roots = batch.root_positions[exists]
    assert batch.root_tokens.roll(-step)[exists].tolist() == (roots + 1 + step).tolist()
    assert batch.teacher_features.roll(-step, 0)[exists, 0].tolist() == (roots + 1 + step).tolist()
    assert batch.next_tokens.roll(-step)[exists].tolist() == (roots + 2 + step).tolist()
