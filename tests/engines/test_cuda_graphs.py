"""Recorded calls of the torch engine: the same results as plain ones, from memory of their own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prism_trt.config import TreeShape
from prism_trt.engines.cuda_graphs import GraphedTorchEngine, PaddedCall
from prism_trt.engines.protocol import Engine, EngineLimits, TokenBatch
from prism_trt.engines.recordings import CudaGraphs, Record, Recording, Recordings, Tensors, record_nothing
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.speculative.decoder import Request, generate
from prism_trt.target.model import KVPool
from tests.tiny import DRAFTERS, tiny_drafter, tiny_target

CPU = torch.device("cpu")
LIMITS = EngineLimits(slots=3, context=80, tokens_per_call=192)
TREE = TreeShape.parse("8/3/3")


class NoHostReads(TorchDispatchMode):
    """Refuses what a capture would: operations whose result the host must know."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def record_strictly(call: Callable[[], Tensors]) -> Recording:
    """`record_nothing` of calls that never wait for the device."""
    with NoHostReads():
        return record_nothing(call)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float32 sums."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def decode(engine: Engine, tree: TreeShape | None) -> list[list[int]]:
    """Five requests on three slots, so that rows come and go; the last one ends at the limit of the context."""
    prompts = [
        torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (3, 20, 1, 9, 68)
    ]
    return [result.tokens for result in generate(engine, [Request(prompt, 12, tree=tree) for prompt in prompts])]


@pytest.mark.parametrize("kind", ["two modules", "multi", "two layers", "standard"])
def test_recorded_calls_decode_what_plain_ones_do(kind: str) -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, **DRAFTERS[kind])
    plain = TorchEngine(target, drafter, LIMITS, CPU)
    recorded = GraphedTorchEngine(target, drafter, LIMITS, CPU, torch.float32, record_strictly)
    assert isinstance(recorded, Engine)
    expected = decode(plain, None)
    assert decode(recorded, None) == expected and decode(recorded, TREE) == expected
    count = len(recorded.recordings)
    assert decode(recorded, TREE) == expected
    assert len(recorded.recordings) == count < 40  # one for each size, not for each length or slot


def test_padding_changes_no_output() -> None:
    """Rows of different lengths in slots out of order, twice: the second call replays the first one's recording."""
    target = tiny_target()
    drafter = tiny_drafter(target, 2)
    engines = (
        TorchEngine(target, drafter, LIMITS, CPU),
        GraphedTorchEngine(target, drafter, LIMITS, CPU, torch.float32, record_strictly),
    )
    for seed, slots, counts in ((0, [2, 0], [5, 3]), (1, [0, 1], [1, 5])):
        tokens = torch.randint(0, 320, (2, 5), generator=torch.Generator().manual_seed(seed))
        valid, start = torch.tensor(counts), torch.zeros(2).long()
        batch = TokenBatch(tokens, torch.arange(5).expand(2, 5), torch.tensor(slots), start, valid)
        first, second = (engine.forward(batch) for engine in engines)
        drafted = [engine.extend(batch, first.features) for engine in engines]
        for row, count in enumerate(counts):
            assert_close(second.logits[row, :count], first.logits[row, :count])  # type: ignore[index]
            assert_close(second.features[row, :count], first.features[row, :count])
        assert_close(drafted[1].logits, drafted[0].logits)
        assert_close(drafted[1].hidden, drafted[0].hidden)


def test_padding_needs_no_room_in_the_context() -> None:
    engine = GraphedTorchEngine(tiny_target(), None, LIMITS, CPU, torch.float32, record_strictly)
    prompt = torch.randint(0, 320, (75,))
    engine.forward(TokenBatch.one_row(prompt, 0), "none")
    full = engine.forward(TokenBatch.one_row(prompt[:5], 75))  # padded to 8
    expected = engine._target.head(engine._target.forward_sequence(torch.cat((prompt, prompt[:5]))[None]))[:, 75:]
    torch.testing.assert_close(full.logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(PrismError, match="needs 81 K/V entries but the context has 80"):
        engine.forward(TokenBatch.one_row(prompt[:6], 75))


class OnDevice(TorchDispatchMode):
    """Refuses tensors of the processor: a capture cannot wait for their transfer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            # Numbers become tensors of the processor without dimensions, which need no transfer.
            assert not isinstance(value, torch.Tensor) or value.dim() == 0 or value.device.type == "meta", func
        return result


@pytest.mark.parametrize("kind", ["two modules", "multi", "standard"])
def test_what_is_recorded_stays_on_the_device(kind: str) -> None:
    """On a device whose tensors have no contents: reading one on the host would raise."""
    tokens = torch.randint(0, 320, (2, 5))
    batch = TokenBatch(
        tokens, torch.arange(5).expand(2, 5), torch.tensor([2, 0]), torch.zeros(2).long(), torch.tensor([5, 3])
    )
    pool = KVPool.allocate(1, LIMITS.slots, 1, LIMITS.context + 1, 2, torch.float32, CPU)
    call = PaddedCall.of(batch, pool, LIMITS)
    assert call is not None and call.sizes == (2, 8, 80)
    target, meta = tiny_target(), torch.device("meta")
    drafter = tiny_drafter(target, **DRAFTERS[kind])
    engine = GraphedTorchEngine(target, drafter, LIMITS, meta, torch.bfloat16, record_nothing)
    inputs = {name: value.to(meta) for name, value in call.tensors.items()}
    hidden = torch.empty(2, 8, engine.hidden_size, dtype=torch.bfloat16, device=meta)
    with torch.inference_mode(), OnDevice():
        found = engine._recorded_forward("all", inputs)
        first = engine._recorded_draft(0, {**inputs, "hidden": found["features"]})
        step = engine._recorded_draft(1, {**inputs, "hidden": hidden})
    assert found["greedy"].shape == (2, 8) and first["hidden"].shape == (2, 1, engine.hidden_size)
    assert step["logits"].shape[:2] == (2, 8)
    assert engine._drafter is not None
    for layer in engine._drafter.module(1).stack:
        layer.frequencies = layer.frequencies.new_ones(layer.head_dim // 2, device=CPU)
    with pytest.raises(AssertionError), torch.inference_mode(), OnDevice():
        engine._recorded_draft(1, {**inputs, "hidden": hidden})


def test_recordings_keep_their_inputs_and_give_copies() -> None:
    calls: list[int] = []

    def make(memory: Tensors) -> Callable[[], Tensors]:
        calls.append(1)
        return lambda: {"y": memory["x"] * 2}

    recordings = Recordings(record_nothing, most=2)
    outputs = [recordings.run("a", {"x": torch.full((2,), float(n))}, make)["y"] for n in range(3)]
    assert [output.tolist() for output in outputs] == [[0, 0], [2, 2], [4, 4]] and len(calls) == 1
    for key in ("b", "a", "c", "a"):  # b is the longest unused when c comes
        recordings.run(key, {"x": torch.zeros(2)}, make)
    assert len(calls) == 3 and len(recordings) == 2
    recordings.run("b", {"x": torch.zeros(2)}, make)
    assert len(calls) == 4


def test_what_a_recording_uses_lives_as_long_as_it() -> None:
    """A captured graph holds addresses only."""

    class Call:
        def __call__(self) -> Tensors:
            return {"y": torch.zeros(1)}

    made: list[weakref.ref[Call]] = []

    def make(memory: Tensors) -> Call:
        call = Call()
        made.append(weakref.ref(call))
        return call

    recordings = Recordings(lambda call: Recording(lambda: None, call()), most=1)
    recordings.run("a", {}, make)
    assert made[0]() is not None
    recordings.run("b", {}, make)
    assert made[0]() is None and made[1]() is not None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["two modules", "multi"])
def test_captured_calls_decode_what_plain_ones_do(kind: str) -> None:
    """float32 with exact products, because kernels for other sizes round differently."""
    assert not torch.backends.cuda.matmul.allow_tf32
    device = torch.device("cuda")
    target = tiny_target()
    drafter = tiny_drafter(target, **DRAFTERS[kind])
    record: Record = CudaGraphs()
    captured = GraphedTorchEngine(target, drafter, LIMITS, device, torch.float32, record)
    expected = decode(TorchEngine(target, drafter, LIMITS, device), None)
    for _ in range(2):
        assert decode(captured, None) == expected and decode(captured, TREE) == expected
