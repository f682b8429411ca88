"""Plans built for GPUs that are not here, and what the builder made of the networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prism_trt.config import TreeShape
from prism_trt.convert.compile import Extent, compile_network, serving_profile
from prism_trt.convert.drafter import emit_round, emit_step
from prism_trt.convert.graph import Emitted, Graph
from prism_trt.convert.layers import BuiltLayer, copied_weights, expanded_heads, fused_attentions, parse_layers
from prism_trt.convert.target import emit_target
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.engines.tensorrt.names import LIVE
from prism_trt.errors import PrismError
from prism_trt.progress import progress
from tests.tiny import tiny_drafter, tiny_target

ROUND = TreeShape.parse("16/4/4")
LIMITS = NetworkLimits(slots=4, context=80, prefill_tokens=32, shared_tokens=16)
PROFILE = serving_profile(LIMITS)


def emitted(trt: Any, network: str, dtype: torch.dtype) -> Emitted:
    """A network of tiny models whose heads are wide enough for TensorRT's fused attention."""
    target = tiny_target(hidden_size=128, head_dim=64)
    drafter = tiny_drafter(target, modules=2)
    if network == "target":
        return emit_target(trt, target.model, drafter, LIMITS.capacity, dtype)
    if network == "step":
        return emit_step(trt, drafter, target.model, LIMITS.capacity, dtype)
    return emit_round(trt, drafter, target.model, ROUND, LIMITS.capacity, dtype)


def built(trt: Any, network: str, capability: str, dtype: torch.dtype, plan: Path) -> list[BuiltLayer]:
    with progress(f"Building {network}") as reporter:
        layers = parse_layers(compile_network(emitted(trt, network, dtype), PROFILE, plan, capability, reporter))
    assert plan.stat().st_size > 0
    return layers


@pytest.mark.parametrize(("capability", "dtype"), [("SM89", torch.float16), ("SM80", torch.bfloat16)])
@pytest.mark.parametrize(("network", "attentions"), [("target", 2), ("step", 1), ("round", ROUND.depth)])
def test_attention_is_fused_and_reads_keys_in_place(
    trt: Any, tmp_path: Path, network: str, attentions: int, capability: str, dtype: torch.dtype
) -> None:
    layers = built(trt, network, capability, dtype, tmp_path / "plan")
    assert len(fused_attentions(layers)) == attentions
    assert not expanded_heads(layers)


def test_attention_to_the_whole_pool_would_copy_it_to_every_head(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the pool is cut to its live entries, and that `expanded_heads` sees it when it is not."""
    monkeypatch.setattr(Graph, "window", lambda self, value, *_, **__: value)
    whole = {**PROFILE, LIVE: Extent(LIMITS.capacity, LIMITS.capacity, LIMITS.capacity)}
    step = emitted(trt, "step", torch.float16)
    assert expanded_heads(parse_layers(compile_network(step, whole, tmp_path / "plan", "SM89")))


def test_only_the_step_network_copies_weights(trt: Any, tmp_path: Path) -> None:
    """Selecting a module by gathering costs a copy of its matrices; unrolled steps use them where they are."""
    plan = tmp_path / "plan"
    copied = copied_weights(built(trt, "step", "SM89", torch.float16, plan))
    assert {name.split("_constant")[0] for name in copied} == {
        "modules.fc",
        "modules.layers.0.qkv",
        "modules.layers.0.o",
        "modules.layers.0.gate_up",
        "modules.layers.0.down",
    }
    assert not copied_weights(built(trt, "round", "SM89", torch.float16, plan))


def test_what_cannot_be_built_is_refused(trt: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    with pytest.raises(PrismError, match="cannot build for SM90"):
        compile_network(emitted(trt, "step", torch.float16), PROFILE, plan, "SM90")
    with pytest.raises(PrismError, match="TensorRT refused"):
        compile_network(emitted(trt, "step", torch.float32), PROFILE, plan, "SM89")
    assert not list(tmp_path.iterdir())


def test_errors_of_the_network_api_are_raised(trt: Any) -> None:
    graph = Graph(trt, torch.float16)
    narrow, wide = graph.input("narrow", torch.float16, (1, 4)), graph.input("wide", torch.float32, (1, 4))
    with graph.scope("somewhere"), pytest.raises(PrismError, match=r"refused somewhere/sum: .*same input types"):
        graph.add(narrow, wide, "sum")


def test_names_say_which_part_of_the_model_a_layer_is(trt: Any) -> None:
    network = emitted(trt, "round", torch.float16).network
    names = [network.get_layer(number).name for number in range(network.num_layers)]
    assert len(set(names)) == len(names)
    assert {"round/steps.2/layers.0/attention/attend_AttentionOutput", "modules.1.layers.0.qkv"} <= set(names)
