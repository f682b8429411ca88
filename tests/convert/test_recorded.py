"""Recorded networks over the walker: padded sizes, one pool, the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prism_trt.config import TreeShape
from prism_trt.convert.plugins import Plugins
from prism_trt.convert.walker import make_walker_engine
from prism_trt.engines.recordings import record_nothing
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.engines.tensorrt.engine import Executable, NetworkEngine
from prism_trt.engines.tensorrt.names import CALL_TOKENS, IN_FLIGHT, LIVE, PICKED_TOKENS
from prism_trt.engines.tensorrt.recorded import RecordedNetwork, padded_sizes
from prism_trt.speculative.decoder import Request, generate
from tests.convert.compare import LIMITS, reference, words
from tests.tiny import DRAFTERS, tiny_drafter, tiny_target

TREE = TreeShape.parse("8/3/3")
PLUGINS = Plugins(LIMITS.slots, 90, Path("unused"))


def record_networks(engine: NetworkEngine) -> list[RecordedNetwork]:
    """Put recordings between the engine and its networks."""

    def recorded(network: Executable) -> RecordedNetwork:
        return RecordedNetwork(network, lambda: network, LIMITS, record_nothing)

    names = [name for name in ("_target", "_step", "_round") if hasattr(engine, name)]
    for name in names:
        setattr(engine, name, recorded(getattr(engine, name)))
    return [getattr(engine, name) for name in names]


def decode(engine: Any, tree: TreeShape | None) -> list[list[int]]:
    """Five requests on three slots, so that slots go idle; the last one ends at the limit of the context."""
    prompts = [words(length, seed=number).tolist() for number, length in enumerate((3, 20, 1, 9, 52))]
    return [result.tokens for result in generate(engine, [Request(p, 8, tree=tree) for p in prompts])]


@pytest.mark.parametrize("kind", ["two modules", "two layers"])
@pytest.mark.parametrize("form", ["round", "step", "plugins"])
def test_recorded_networks_decode_the_targets_tokens(trt: Any, form: str, kind: str) -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, **DRAFTERS[kind])
    shape, plugins = TREE if form == "round" else None, PLUGINS if form == "plugins" else None
    engine = make_walker_engine(trt, target, drafter, LIMITS, torch.float32, shape, plugins=plugins)
    networks = record_networks(engine)
    expected = decode(reference(target, None), None)
    assert decode(engine, TREE) == expected
    counts = [len(network.recordings) for network in networks]
    assert decode(engine, TREE) == expected
    assert [len(network.recordings) for network in networks] == counts  # one for each size and place, not each length
    assert counts[0] > 0 and counts[-1] > 0


def test_calls_are_padded_to_few_sizes() -> None:
    limits = NetworkLimits(slots=4, context=3000, prefill_tokens=512, shared_tokens=60)
    tree = padded_sizes({CALL_TOKENS: 33, PICKED_TOKENS: 33, LIVE: 700}, limits)
    assert tree == {CALL_TOKENS: 60, PICKED_TOKENS: 60, LIVE: 1024}
    extend = padded_sizes({CALL_TOKENS: 3, PICKED_TOKENS: 1, LIVE: 2999}, limits)
    assert extend == {CALL_TOKENS: 4, PICKED_TOKENS: 1, LIVE: 3000}
    assert padded_sizes({CALL_TOKENS: 61, PICKED_TOKENS: 1, LIVE: 61}, limits) is None
    step = padded_sizes({CALL_TOKENS: 10, PICKED_TOKENS: 10, IN_FLIGHT: 30}, limits)
    assert step == {CALL_TOKENS: 16, PICKED_TOKENS: 16, IN_FLIGHT: 36}  # 20 are written already
