"""Whole greedy decodes through walked networks against plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prism_trt.config import TreeShape
from prism_trt.convert.walker import make_walker_engine
from prism_trt.engines.protocol import Engine
from prism_trt.speculative.decoder import Decoder, generate
from prism_trt.speculative.request import Request
from tests.convert.compare import LIMITS, reference, words
from tests.tiny import DRAFTERS, tiny_drafter, tiny_target


def decode(engine: Engine, tree: TreeShape | None) -> list[list[int]]:
    """Five requests on three slots, so that slots go idle; the last one ends at the limit of the context."""
    lengths = [3, 20, 1, 9, 58]
    prompts = [words(length, seed=number).tolist() for number, length in enumerate(lengths)]
    return [result.tokens for result in generate(engine, [Request(p, 8, tree=tree) for p in prompts])]


@pytest.mark.parametrize("fused", [True, False], ids=["round", "step"])
@pytest.mark.parametrize("kind", ["one module", "two modules", "three modules", "multi"])
def test_speculative_decoding_gives_the_targets_tokens(trt: Any, kind: str, fused: bool) -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, **DRAFTERS[kind])
    tree = TreeShape.parse("8/3/3")
    engine = make_walker_engine(trt, target, drafter, LIMITS, torch.float32, tree if fused else None)
    assert decode(engine, tree) == decode(reference(target, None), None)


@pytest.mark.parametrize("fused", [True, False], ids=["round", "step"])
def test_prefixes_are_copied_between_slots(trt: Any, fused: bool) -> None:
    target = tiny_target()
    tree = TreeShape.parse("8/3/3")
    drafter = tiny_drafter(target)
    engine = make_walker_engine(trt, target, drafter, LIMITS, torch.float32, tree if fused else None)
    decoder = Decoder(engine, reuse_prefixes=True)
    shared = words(30, seed=1).tolist()
    reused = 0
    for number in range(3):
        prompt = shared + words(4, seed=10 + number).tolist()
        tokens, request = [], Request(prompt, 6, tree=tree)
        decoder.add(request)
        while decoder.active:
            for event in decoder.step():
                tokens += event.tokens
                reused += event.stats.reused_tokens if event.stats else 0
        assert tokens == generate(reference(target, None), [Request(prompt, 6)])[0].tokens
    assert reused == 2 * (len(shared) - 1)
