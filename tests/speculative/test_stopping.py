from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_trt.speculative.stopping import StopRule, TextStream

EOS = 99


class Letters:
    """Detokenizer of a vocabulary of strings; the characters of incomplete tokens come with the next one."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words, self.late = words, ""

    def push(self, ids: Sequence[int]) -> str:
        text = ""
        for token in ids:
            word = self.late + self.words[token]
            self.late = word[-1:] if token % 2 else ""
            text += word[:-1] if token % 2 else word
        return text

    def flush(self) -> str:
        text, self.late = self.late, ""
        return text


WORDS = ["a", "ab", "b", "ba", "c", "abc"]


def expected_text(text: str, stop_words: tuple[str, ...]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        starts = [end - len(word) for word in stop_words if text[:end].endswith(word)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    tokens=st.lists(st.integers(0, len(WORDS) - 1), max_size=12),
    stop_words=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple),
    cuts=st.sets(st.integers(0, 12)),
)
@settings(max_examples=300, deadline=None)
def test_text_does_not_depend_on_how_tokens_arrive(
    tokens: list[int], stop_words: tuple[str, ...], cuts: set[int]
) -> None:
    stream = TextStream(Letters(WORDS), stop_words)
    edges = sorted({0, len(tokens)} | {cut for cut in cuts if cut <= len(tokens)})
    deltas = [stream.push(tokens[a:b]) for a, b in pairwise(edges)] + [stream.flush()]
    text, stopped = expected_text("".join(WORDS[token] for token in tokens), stop_words)
    assert "".join(deltas) == text
    assert stream.stopped or not stopped


def test_text_that_may_begin_a_stop_word_is_held() -> None:
    words = ["Hel", "lo\n", "Us", "er", ":", " x", "e"]
    stream = TextStream(Letters2(words), ["\nUser:"])
    assert stream.push([0]) == "Hel"
    assert stream.push([1]) == "lo"
    assert stream.push([2]) == ""
    assert stream.push([6]) == ""
    assert stream.push([1, 2]) == "\nUselo"  # not the stop word after all, but it may begin again
    assert stream.push([3]) == ""
    assert not stream.stopped
    assert stream.push([4, 5]) == ""
    assert stream.push([0]) == stream.flush() == ""  # the stop word is complete


class Letters2(Letters):
    def push(self, ids: Sequence[int]) -> str:
        return "".join(self.words[token] for token in ids)


def test_flush_releases_what_is_held() -> None:
    stream = TextStream(Letters2(["ab"]), ["abc"])
    assert stream.push([0]) == ""
    assert stream.flush() == "ab"


def test_end_of_sequence_has_no_text_and_ends_it() -> None:
    stream = TextStream(Letters2(["ab"]), ["abc"], [EOS])
    assert stream.push([0, EOS, 0]) == "ab"
    assert stream.stopped


def test_rule_max_tokens() -> None:
    rule = StopRule(3, (), None)
    assert rule.admit([5, 6]) == ([5, 6], None)
    assert rule.admit([7, 8]) == ([7], "length")


def test_rule_end_of_sequence_inside_a_path() -> None:
    rule = StopRule(10, (EOS,), None)
    assert rule.admit([5, EOS, 6, EOS]) == ([5, EOS], "stop")
    assert StopRule(2, (EOS,), None).admit([5, EOS]) == ([5, EOS], "stop")
    assert StopRule(2, (EOS,), None).admit([5, 6, EOS]) == ([5, 6], "length")


def test_rule_stop_word_keeps_the_token_that_completes_it() -> None:
    rule = StopRule(10, (), TextStream(Letters2(WORDS), ["bc"]))
    assert rule.admit([0, 1]) == ([0, 1], None)
    assert rule.admit([4, 0]) == ([4], "stop")
