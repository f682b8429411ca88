"""SmolLM2-135M-Instruct with the shipped drafter: walked decodes, and plans for two GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prism_trt.config import TreeShape
from prism_trt.convert.compile import compile_network, serving_profile
from prism_trt.convert.drafter import emit_round, emit_step
from prism_trt.convert.layers import copied_weights, expanded_heads, fused_attentions, parse_layers
from prism_trt.convert.target import emit_target
from prism_trt.convert.walker import make_walker_engine
from prism_trt.drafter.checkpoint import load_drafter
from prism_trt.drafter.model import Drafter
from prism_trt.engines.protocol import Engine
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.engines.torch_engine import TorchEngine
from prism_trt.quickstart.artifacts import SHIPPED
from prism_trt.speculative.decoder import Request, generate
from prism_trt.target.loading import Target

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def drafter(smollm2: Target) -> Drafter:
    return load_drafter(SHIPPED, smollm2)


def test_walked_decoding_gives_the_targets_tokens(trt: Any, smollm2: Target, drafter: Drafter) -> None:
    """In float32 the tokens and acceptance are PyTorch's; in float16 the tokens are those of the float16 target."""
    limits = NetworkLimits(slots=1, context=128, prefill_tokens=64, shared_tokens=16)
    tree = TreeShape.parse("16/4/6")
    prompt = smollm2.tokenizer.encode_chat([{"role": "user", "content": "Name three fruits and their colours."}])

    def run(engine: Engine, shape: TreeShape | None) -> tuple[list[int], float]:
        result = generate(engine, [Request(prompt, 40, tree=shape)])[0]
        return result.tokens, result.statistics.acceptance_length

    expected = run(TorchEngine(smollm2, drafter, limits.engine, torch.device("cpu")), tree)
    assert expected[1] > 1.5
    assert run(make_walker_engine(trt, smollm2, drafter, limits, torch.float32, tree), tree) == expected
    half = make_walker_engine(trt, smollm2, drafter, limits, torch.float16, tree)
    tokens, acceptance_length = run(half, tree)
    assert tokens == run(half, None)[0]
    assert acceptance_length > 1.5


@pytest.mark.parametrize("capability", ["SM80", "SM89"])
def test_plans_hold_the_weights_once(
    trt: Any, smollm2: Target, drafter: Drafter, tmp_path: Path, capability: str
) -> None:
    limits = NetworkLimits(slots=8, context=2048, prefill_tokens=512, shared_tokens=64)
    shape = TreeShape.parse("60/10/6")
    model, config = smollm2.model, smollm2.config
    words = sum(parameter.numel() for parameter in model.parameters())
    drafted = sum(parameter.numel() for parameter in drafter.parameters())
    drafted += (config.vocab_size + (drafter.config.draft_vocab_size or 0)) * config.hidden_size
    common = (limits.capacity, torch.float16)
    networks = {
        "target": (emit_target(trt, model, drafter, *common), words, config.num_layers),
        "step": (emit_step(trt, drafter, model, *common), drafted, 1),
        "round": (emit_round(trt, drafter, model, shape, *common), drafted, shape.depth),
    }
    for name, (emitted, weights, attentions) in networks.items():
        plan = tmp_path / name
        layers = parse_layers(compile_network(emitted, serving_profile(limits), plan, capability))
        size = plan.stat().st_size
        print(f"{capability} {name}: {len(layers)} layers, {size / 2**20:.1f} MiB for {weights / 2**19:.1f} MiB")
        assert len(fused_attentions(layers)) == attentions
        assert not expanded_heads(layers)
        assert bool(copied_weights(layers)) == (name == "step")
        assert size < 2 * weights + 16 * 2**20  # code and tables
