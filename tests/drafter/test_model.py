from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from prism_trt.config import DrafterConfig
from prism_trt.drafter.model import Drafter, ProcessingModule, copy_modules
from tests.tiny import tiny_drafter, tiny_target


def reference(module: ProcessingModule, embeds: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """One module over a whole sequence [T, H], written out from the paper's description with complex rotations."""
    weights = dict(module.named_parameters())
    config_heads, groups, width = 4, 2, 16
    x = torch.cat((embeds, hidden), -1) @ weights["fc.weight"].T
    length = len(x)
    turns = 10000.0 ** (-torch.arange(0, width, 2) / width) * torch.arange(length)[:, None]
    rotation = torch.polar(torch.ones_like(turns), turns)

    def rotated(rows: torch.Tensor) -> torch.Tensor:
        half = width // 2
        turned = torch.complex(rows[..., :half], rows[..., half:]) * rotation[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    q, k, v = (
        (x @ weights[f"layers.0.self_attn.{name}_proj.weight"].T).view(length, -1, width) for name in ("q", "k", "v")
    )
    q, k = rotated(q), rotated(k)
    attended = []
    for head in range(config_heads):
        group = head * groups // config_heads
        scores = q[:, head] @ k[:, group].T / width**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        attended.append(scores.softmax(-1) @ v[:, group])
    x = x + torch.cat(attended, -1) @ weights["layers.0.self_attn.o_proj.weight"].T
    normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights["layers.0.post_attention_layernorm.weight"]
    gate, up = (normed @ weights[f"layers.0.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (gate * gate.sigmoid() * up) @ weights["layers.0.mlp.down_proj.weight"].T


def test_a_module_computes_what_the_paper_says() -> None:
    target = tiny_target()
    module = tiny_drafter(target, modules=1).module(0)
    generator = torch.Generator().manual_seed(0)
    embeds, hidden = torch.randn(7, 64, generator=generator), torch.randn(7, 64, generator=generator)
    positions = torch.arange(7)
    x = module.fuse(embeds, hidden)
    (layer,) = module.stack
    q, (k, v) = layer.query(x, positions), layer.key_value(x, positions)
    q, k, v = (rows.transpose(0, 1)[None] for rows in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = layer.finish(x, attended[0].transpose(0, 1).flatten(1))
    torch.testing.assert_close(found, reference(module, embeds, hidden), rtol=1e-4, atol=1e-4)


def test_steps_past_the_map_use_its_last_module() -> None:
    drafter = tiny_drafter(tiny_target(), modules=2, step_map=(0, 1, 0, 1))
    assert [drafter.module_of_step(k) for k in range(7)] == [0, 1, 0, 1, 1, 1, 1]
    assert drafter.module(2) is drafter.modules_[0]


@pytest.mark.parametrize(
    "change", [{"step_map": (0,)}, {"step_map": (0, 2)}, {"num_kv_heads": 3}, {"head_dim": 15}, {"unknown": 1}]
)
def test_inconsistent_configs_are_refused(change: dict[str, object]) -> None:
    values = tiny_drafter(tiny_target(), modules=2).config.model_dump()
    with pytest.raises(ValidationError):
        DrafterConfig.model_validate(values | change)


def test_copied_modules_are_equal_and_independent() -> None:
    one = tiny_drafter(tiny_target(), modules=1)
    three = copy_modules(one, 3, (0, 1, 2))
    assert three.config.num_modules == 3
    with torch.no_grad():
        for parameter in three.modules_[2].parameters():
            parameter.add_(1)
    for name, value in one.modules_[0].state_dict().items():
        assert torch.equal(three.modules_[0].state_dict()[name], value)
        assert torch.equal(three.modules_[1].state_dict()[name], value)
        assert torch.equal(three.modules_[2].state_dict()[name], value + 1)


def test_the_head_is_restricted_to_the_draft_vocabulary() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, draft_vocab_size=50)
    assert drafter.draft_vocab is not None
    head = target.model.head_weight
    assert torch.equal(drafter.head_rows(head), head[drafter.draft_vocab])
    assert tiny_drafter(target, draft_vocab_size=None).head_rows(head) is head


def test_rotary_angles_stay_float32_in_a_bfloat16_drafter() -> None:
    drafter = tiny_drafter(tiny_target()).bfloat16()
    assert drafter.module(0).layers[0].frequencies.dtype == torch.float32


def test_a_vocabulary_of_another_size_than_the_config_is_refused() -> None:
    config = tiny_drafter(tiny_target(), draft_vocab_size=50).config
    with pytest.raises(ValueError, match="50"):
        Drafter(config, torch.arange(49))
