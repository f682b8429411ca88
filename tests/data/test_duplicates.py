"""Repeated prompts and questions of evaluation sets are found, others are not."""

from __future__ import annotations

import random

import pytest

from prism_trt.data.duplicates import (
    EVALUATION_WORDS,
    SHINGLE_WORDS,
    evaluation_grams,
    near_duplicates,
    repeats_evaluation,
    word_grams,
)

QUESTION = "In the sequence 2, 4, 8, 16, which number follows, and how is it found from the others?"


def test_word_grams_ignore_case_punctuation_and_form() -> None:
    assert word_grams("The  quick,\nBROWN fox", 2) == {"the quick", "quick brown", "brown fox"}
    assert word_grams("ﬁne", 3) == word_grams("Fine!", 3) == {"fine"}
    assert word_grams(" ?! ", 3) == {"?!"}


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        (f"Answer quickly. {QUESTION.upper()} Thanks!", True),
        (" ".join(QUESTION.split()[:EVALUATION_WORDS]), True),
        (" ".join(QUESTION.split()[: EVALUATION_WORDS - 1]), False),
        (QUESTION.replace("which", "what"), False),
        ("why is the sky blue", True),
        ("Tell me: why is the sky blue, and why is the sea blue as well, on most days?", False),
    ],
)
def test_questions_of_evaluation_sets_are_found(text: str, repeated: bool) -> None:
    assert repeats_evaluation(text, evaluation_grams([QUESTION, "Why is the sky blue?"])) is repeated


def test_nothing_repeats_an_empty_evaluation_set() -> None:
    assert not repeats_evaluation(QUESTION, evaluation_grams([]))


@pytest.mark.parametrize("similarity", [0.6, 0.8, 1.0])
def test_near_duplicates_are_those_of_comparing_all_pairs(similarity: float) -> None:
    numbers = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    texts = [" ".join(numbers.choices(words, k=numbers.randint(3, 60))) for _ in range(40)]
    for original in list(texts):
        changed = original.split()
        for _ in range(numbers.randint(0, 3)):
            changed[numbers.randrange(len(changed))] = "new"
        texts.append(" ".join(changed))

    kept: list[set[str]] = []
    expected = []
    for text in texts:
        grams = word_grams(text, SHINGLE_WORDS)
        expected.append(any(len(grams & other) >= similarity * len(grams | other) for other in kept))
        if not expected[-1]:
            kept.append(grams)
    found = list(near_duplicates(texts, similarity))
    assert sum(expected) >= 8
    assert not any(seen and not true for seen, true in zip(found, expected, strict=True))
    assert sum(found) >= 0.9 * sum(expected)
