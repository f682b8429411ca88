from __future__ import annotations

import numpy as np
import pytest

from prism_trt.train.vocabulary import choose_draft_vocab


def test_most_frequent_tokens_in_ascending_order_with_the_forced_ones() -> None:
    vocab = choose_draft_vocab(np.array([5, 0, 9, 9, 1, 0, 7]), 4, always=[5])
    assert vocab is not None
    assert vocab.tolist() == [2, 3, 5, 6]


def test_ties_go_to_the_lower_id() -> None:
    vocab = choose_draft_vocab(np.array([1, 3, 1, 1]), 3, always=[])
    assert vocab is not None
    assert vocab.tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [0, 4, 9])
def test_the_whole_vocabulary_needs_no_map(size: int) -> None:
    assert choose_draft_vocab(np.ones(4, dtype=np.int64), size, always=[1]) is None
