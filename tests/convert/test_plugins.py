"""The step network with plugins, walked, against the PyTorch drafter; without plugins see `test_drafter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prism_trt.convert import walker
from prism_trt.convert.drafter import drafter_linears, emit_step
from prism_trt.convert.plugins import Plugins
from prism_trt.convert.walker import Walker, make_walker_engine
from prism_trt.engines.protocol import TokenBatch
from prism_trt.engines.tensorrt.binding import calls_of, slot_inputs
from prism_trt.engines.tensorrt.names import HIDDEN, LOGITS, NEXT_HIDDEN, PICKED, STEP
from prism_trt.quantize.scales import LinearScales, to_quantized
from prism_trt.target.model import KVPool
from tests.convert.compare import LIMITS, assert_as_exact, assert_close, following, reference, round_weights, words
from tests.convert.test_drafter import draft_inputs, models, own_features, step_logits
from tests.plugins.cases import assert_close as assert_close_to_float64
from tests.plugins.cases import attention_cases, expected_attention, expected_linear, linear_cases

PLUGINS = Plugins(LIMITS.slots, 90, Path("unused"))


def test_the_walker_computes_what_the_kernels_do() -> None:
    """Against the references that the kernels are held to."""
    for case in linear_cases()[::3]:
        arguments = case.arguments()
        expected = expected_linear(**arguments)
        del arguments["tactic"]
        given = {name: value for name, value in arguments.items() if value is not None}
        assert_close_to_float64(walker._step_linear(**given), expected, case.dtype)
    for attention in attention_cases()[::2]:
        arguments = attention.arguments()
        expected, *pools = expected_attention(**arguments)
        del arguments["tactic"]
        assert_close_to_float64(walker._pool_attention(**arguments), expected, attention.dtype)
        for name, pool in zip(("k_pool", "v_pool"), pools, strict=True):
            assert torch.equal(arguments[name].view(torch.int16), pool.view(torch.int16))


@pytest.mark.parametrize("kind", ["one module", "three modules", "bias", "multi", "two layers", "standard"])
def test_steps_equal_the_drafter(trt: Any, kind: str) -> None:
    target, drafter = models(kind)
    raw, fused = own_features(drafter, draft_inputs()[1])
    expected = step_logits(reference(target, drafter), raw)
    actual = step_logits(make_walker_engine(trt, target, drafter, LIMITS, torch.float32, plugins=PLUGINS), fused)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


def test_steps_in_half_precision_are_as_exact_as_pytorch(trt: Any) -> None:
    target, drafter = models("three modules")
    round_weights(target.model, torch.float16)
    round_weights(drafter, torch.float16)
    features = draft_inputs()[1][..., :64].half()
    engines = (
        make_walker_engine(trt, target, drafter, LIMITS, torch.float16, plugins=PLUGINS),
        reference(target, drafter, torch.float16),
        reference(target, drafter),
    )
    for actual, rounded, expected in zip(*(step_logits(engine, features) for engine in engines), strict=True):
        assert_as_exact(actual, rounded, expected)


def test_rows_at_different_draft_steps_share_a_call(trt: Any) -> None:
    """One row extends over four tokens while another runs step 2 over two nodes; the pools agree, too."""
    target, drafter = models("three modules")
    torch_engine = reference(target, drafter)
    features = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(4))
    own = torch.eye(2, dtype=torch.bool)[None]

    # PyTorch, row by row: slot 2 has six committed entries, slot 0 five and two nodes of step 1.
    torch_engine.extend(following(words(1, 6, seed=0), [2], [0], [6]), features)
    output = torch_engine.extend(following(words(1, 5, seed=1), [0], [0], [5]), features[:, :5])
    nodes = TokenBatch(
        words(1, 2, seed=2), torch.full((1, 2), 5), torch.tensor([0]), torch.tensor([5]), torch.tensor([2]), own
    )
    output = torch_engine.step(1, nodes, output.hidden.expand(-1, 2, -1))
    pool = copy_pool(torch_engine._draft_pool)
    late = TokenBatch(
        words(1, 2, seed=3), torch.full((1, 2), 6), nodes.slots, nodes.lengths, nodes.counts, own.repeat(1, 1, 2), 2
    )
    early = following(words(1, 4, seed=4), [2], [6], [4])
    fed = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(5))
    expected_late, expected_early = torch_engine.step(2, late, output.hidden), torch_engine.extend(early, fed)

    # One call of four tokens per row and six in-flight entries; of the early row, the first two are committed ones.
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[0, :, :2], mask[0, :, 2:] = True, torch.ones(4, 4).tril().bool()
    assert late.mask is not None
    mask[1, :2, :4] = late.mask[0]
    batch = TokenBatch(
        tokens=torch.cat((early.tokens, torch.nn.functional.pad(late.tokens, (0, 2)))),
        positions=torch.cat((early.positions, torch.nn.functional.pad(late.positions, (0, 2)))),
        slots=torch.tensor([2, 0]),
        lengths=torch.tensor([4, 5]),
        counts=torch.tensor([4, 2]),
        mask=mask,
        offset=2,
    )
    network = Walker(emit_step(trt, drafter, target.model, LIMITS.capacity, torch.float32, plugins=PLUGINS))
    (call,) = calls_of(batch, LIMITS, idle_rows=False)
    outputs = network.run(
        slot_inputs(call, pool)
        | {
            HIDDEN: torch.cat((fed, torch.nn.functional.pad(output.hidden, (0, 0, 0, 2)))),
            STEP: torch.tensor([[0, 0, 0, 0], [2, 2, 2, 2]], dtype=torch.int32),
            PICKED: torch.arange(4, dtype=torch.int32).repeat(2, 1),
        }
    )
    assert_close(outputs[LOGITS][:1, 3:], expected_early.logits)
    assert_close(outputs[LOGITS][1:, :2], expected_late.logits)
    assert_close(outputs[NEXT_HIDDEN][1:, :2], expected_late.hidden)
    for walked, exact in ((pool.keys, torch_engine._draft_pool.keys), (pool.values, torch_engine._draft_pool.values)):
        assert_close(walked[:, 2, :, :10], exact[:, 2, :, :10])
        assert_close(walked[:, 0, :, :9], exact[:, 0, :, :9])


def copy_pool(pool: KVPool) -> KVPool:
    """Room for what a call writes past the context, as networks need it."""
    room = LIMITS.capacity - pool.keys.shape[3]
    keys, values = (torch.nn.functional.pad(each, (0, 0, 0, room)) for each in (pool.keys, pool.values))
    return KVPool(keys, values)


def test_fp8_modules_are_stacked(trt: Any) -> None:
    """The step network stores every module in FP8, one scale per matrix, and computes what those weights mean."""
    target, drafter = models("two modules")
    scales = {}
    for name, linears in drafter_linears(drafter).items():
        scale = max(linear.weight.abs().max() for linear in linears) / torch.finfo(torch.float8_e4m3fn).max
        scales[name] = LinearScales(torch.float8_e4m3fn, scale, torch.tensor(1.0))
        for linear in linears:
            linear.weight.data = to_quantized(linear.weight, scale, torch.float8_e4m3fn).float() * scale
    emitted = emit_step(trt, drafter, target.model, LIMITS.capacity, torch.float32, scales, PLUGINS)
    stored = {name: content for name, content in emitted.constants.items() if content.dtype == torch.float8_e4m3fn}
    assert {name: len(content) for name, content in stored.items()} == {
        f"modules.{name}": 2 for name in ("fc", "layers.0.qkv", "layers.0.o", "layers.0.gate_up", "layers.0.down")
    }
    features = draft_inputs()[1][..., :64]
    expected = step_logits(reference(target, drafter), features)
    walked = make_walker_engine(trt, target, drafter, LIMITS, torch.float32, scales=scales, plugins=PLUGINS)
    for a, b in zip(step_logits(walked, features), expected, strict=True):
        assert_close(a, b)
