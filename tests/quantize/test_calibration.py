"""Scales: where they come from, and networks that compute what ModelOpt simulates."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prism_trt.config import TreeShape
from prism_trt.convert.walker import make_walker_engine
from prism_trt.data.sequences import FeatureSequence
from prism_trt.drafter.model import Drafter, ProcessingModule
from prism_trt.engines.protocol import FusedDraftEngine
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.errors import PrismError
from prism_trt.quantize.calibration import QuantizedModels, calibrate
from prism_trt.quantize.quality import with_features
from prism_trt.quantize.quantization import calibrate_and_measure
from prism_trt.quantize.scales import Quantization, load_scales, save_scales
from prism_trt.speculative.tree import grow_tree_stepwise
from prism_trt.target.loading import Target
from prism_trt.train.alignment import aligned_steps
from prism_trt.train.batch import pack
from tests.convert.compare import CPU, LIMITS, following, reference, words
from tests.tiny import DRAFTERS, tiny_drafter, tiny_target

pytest.importorskip("modelopt", reason="ModelOpt is missing: install the fp8 extra")
KINDS: list[Quantization] = ["fp8", "int8"]


def answers(target: Target, drafter: Drafter | None, count: int = 4) -> list[FeatureSequence]:
    """Random tokens with the target's features, 8 of them prompts."""
    return [with_features(target.model, drafter, words(24, seed=number), 8) for number in range(count)]


def calibrated(
    quantization: Quantization, kind: str = "two modules", **overrides: Any
) -> tuple[Target, Drafter, QuantizedModels]:
    target = tiny_target()
    drafter = tiny_drafter(target, **{**DRAFTERS[kind], **overrides})
    return target, drafter, calibrate(target.model, drafter, answers(target, drafter), quantization, steps=4)


def inputs_by_step(drafter: Drafter, target: Target, sequences: list[FeatureSequence], steps: int) -> list[Tensor]:
    """Greatest magnitude that the module of each step feeds to its fusion layer: hooks instead of quantizers."""
    seen = [torch.zeros(()) for _ in range(steps)]
    count = 0

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal count
        seen[count % steps] = torch.maximum(seen[count % steps], args[0].abs().max())
        count += 1

    alone = copy.deepcopy(drafter)
    for module in alone.modules_:
        assert isinstance(module, ProcessingModule) and module.fc is not None
        module.fc.register_forward_pre_hook(hook)
    for sequence in sequences:
        aligned_steps(alone, target.model.model.embed_tokens.weight, pack([sequence]), steps)
    return seen


def test_each_module_is_calibrated_on_what_its_own_steps_read() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, modules=3, step_map=(1, 0, 2))
    sequences = answers(target, drafter)
    models = calibrate(target.model, drafter, sequences, "fp8", steps=4)
    fed = [with_features(models.model, drafter, each.tokens, each.prompt_length) for each in sequences]
    seen = inputs_by_step(drafter, target, fed, 4)
    expected = {1: seen[0], 0: seen[1], 2: torch.maximum(seen[2], seen[3])}
    values = sorted(expected.values())
    assert all(greater > 1.005 * less for less, greater in itertools.pairwise(values))  # so that a mix-up shows
    for module, greatest in expected.items():
        scale = models.scales[f"modules.{module}.fc"].activation
        assert scale is not None
        torch.testing.assert_close(scale * 448, greatest)


def test_only_calibration_data_decides_the_scales_of_activations() -> None:
    target = tiny_target()
    one, other = (calibrate(target.model, None, answers(target, None, n), "fp8", 1).scales for n in (1, 4))
    assert (
        one.keys() == other.keys() == {f"layers.{n}.{name}" for n in (0, 1) for name in ("qkv", "o", "gate_up", "down")}
    )
    for name in one:
        a, b = one[name], other[name]
        assert a.activation is not None and b.activation is not None
        assert torch.equal(a.weight, b.weight) and a.activation <= b.activation
    assert any(one[name].activation != other[name].activation for name in one)
    state = target.model.state_dict()
    fused = [state[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    greatest = max(float(matrix.abs().max()) for matrix in fused)
    assert float(one["layers.0.gate_up"].weight) * 448 == pytest.approx(greatest)


def assert_as_simulated(actual: Tensor, simulated: Tensor, exact: Tensor) -> None:
    """`actual` is as ModelOpt's `simulated` up to sums that round to the other neighbour; `exact` is much farther."""
    error, cost = ((other - simulated).norm() / simulated.norm() for other in (actual, exact))
    assert cost > 1e-3
    assert error < cost / 10


@pytest.mark.parametrize("quantization", KINDS)
def test_target_network_computes_what_modelopt_simulates(trt: Any, quantization: Quantization) -> None:
    target, drafter, models = calibrated(quantization)
    tokens = words(1, 20, seed=9)
    walked = make_walker_engine(trt, target, drafter, LIMITS, torch.float32, scales=models.scales)
    logits = walked.forward(following(tokens, [0], [0], [20])).logits
    assert logits is not None
    simulated = models.model.head(models.model.forward_sequence(tokens))
    assert_as_simulated(logits, simulated, target.model.head(target.model.forward_sequence(tokens)))


@pytest.mark.parametrize("kind", ["two modules", "multi", "bias", "standard"])
def test_round_network_drafts_what_modelopt_simulates(trt: Any, kind: str) -> None:
    target, drafter, models = calibrated("fp8", kind, draft_vocab_size=None)
    shape = TreeShape.parse("5/1/4")
    batch = following(words(1, 6, seed=0), [0], [0], [6])
    features = torch.randn(1, 6, 192, generator=torch.Generator().manual_seed(1))
    raw = features if drafter.fusion is not None else features[..., :64]
    assert models.drafter is not None
    engine = make_walker_engine(trt, target, drafter, LIMITS, torch.float32, shape, models.scales)
    assert isinstance(engine, FusedDraftEngine)
    simulated = TorchEngine(target, models.drafter, LIMITS.engine, CPU, torch.float32)
    trees = [
        engine.draft_round(batch, models.drafter.fuse_features(raw), shape),
        grow_tree_stepwise(simulated, batch, raw, shape),
        grow_tree_stepwise(reference(target, drafter), batch, raw, shape),
    ]
    assert torch.equal(trees[0].tokens, trees[1].tokens)
    assert_as_simulated(*(tree.log_probs for tree in trees))


def test_step_network_keeps_several_modules_in_its_own_type(trt: Any) -> None:
    target, drafter, models = calibrated("fp8")
    batch, features = following(words(1, 6, seed=0), [0], [0], [6]), torch.randn(1, 6, 64)
    stepped = make_walker_engine(trt, target, drafter, LIMITS, torch.float32, scales=models.scales)
    plain = reference(target, drafter).extend(batch, features)
    torch.testing.assert_close(stepped.extend(batch, features).logits, plain.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantization", KINDS)
def test_scales_survive_their_file(tmp_path: Path, quantization: Quantization) -> None:
    scales = calibrated(quantization)[2].scales
    save_scales(scales, tmp_path)
    loaded = load_scales(tmp_path, quantization)
    assert loaded.keys() == scales.keys()
    for name, linear in scales.items():
        assert torch.equal(loaded[name].weight, linear.weight) and loaded[name].dtype == linear.dtype
        assert loaded[name].activation == linear.activation
        assert (linear.activation is None) == (quantization == "int8")


def test_report_tells_a_gentle_quantisation_from_a_crude_one() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, draft_vocab_size=None)
    sequences = answers(target, drafter, 8)
    reports = {kind: calibrate_and_measure(target, drafter, sequences, kind, 4, "sha")[0] for kind in KINDS}
    assert 0 < reports["int8"].kl_divergence < reports["fp8"].kl_divergence < 1
    assert reports["fp8"].same_first_choice < 1
    assert reports["fp8"].measured_tokens == 2 * 16
    before, after = reports["fp8"].acceptance_length or (0, 0)
    assert before >= 1 and after >= 1


def test_values_that_are_not_finite_are_refused() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    sequences = answers(target, drafter)
    next(drafter.parameters()).data[0, 0] = float("inf")
    with pytest.raises(PrismError, match=r"calibration failed .*inf values"):
        calibrate(target.model, drafter, sequences, "fp8", 4)
