"""Prompts that repeat one another, or a question of an evaluation set."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Set

EVALUATION_WORDS = 13
"""Words in a row that two texts must share to count as the same question (GPT-3, arXiv:2005.14165, appendix C)."""
SHINGLE_WORDS = 5
"""Words of a shingle; the similarity of two prompts is that of their sets of shingles."""

_PERMUTATIONS = 128
_WORD = re.compile(r"\w+")


def word_grams(text: str, size: int) -> set[str]:
    """All runs of `size` words of `text`, without case, punctuation and white space; a shorter text is one run."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold()) or [text.strip()]
    return {" ".join(words[start : start + size]) for start in range(max(1, len(words) - size + 1))}


def evaluation_grams(questions: Iterable[str]) -> set[str]:
    """What `repeats_evaluation` looks for: every run of `EVALUATION_WORDS` words of the questions."""
    return set().union(*(word_grams(question, EVALUATION_WORDS) for question in questions))


def repeats_evaluation(text: str, grams: Set[str]) -> bool:
    """Whether `text` shares a run of words with an evaluation set; texts of fewer words must be equal."""
    return not grams.isdisjoint(word_grams(text, EVALUATION_WORDS))


def near_duplicates(texts: Iterable[str], similarity: float) -> Iterator[bool]:
    """For each text, whether an earlier one that is not a duplicate itself is at least as similar as `similarity`.

    Similarity is the Jaccard index of the sets of shingles. It is computed exactly, but only for candidates that
    MinHash and locality-sensitive hashing find (Broder 1997), so that a pair just above the limit may be missed.

    Args:
        similarity: above 0, up to 1 (the same shingles).
    """
    from datasketch import MinHash, MinHashLSH  # type: ignore[import-untyped]

    # Candidates are checked, so a false one only costs time; above 0.9 the index has too few bands and misses many.
    index = MinHashLSH(threshold=min(similarity, 0.9), num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
    kept: list[set[str]] = []
    for text in texts:
        shingles = word_grams(text, SHINGLE_WORDS)
        sketch = MinHash(num_perm=_PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in shingles])
        repeated = any(_jaccard(shingles, kept[candidate]) >= similarity for candidate in index.query(sketch))
        if not repeated:
            index.insert(len(kept), sketch)
            kept.append(shingles)
        yield repeated


def _jaccard(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)
