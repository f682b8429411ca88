"""Tiny random models: a LLaMA-family target with a byte-level tokenizer, and a drafter for it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from prism_trt.config import DrafterConfig
from prism_trt.drafter.model import Drafter
from prism_trt.target.config import TargetConfig
from prism_trt.target.loading import Target
from prism_trt.target.model import LlamaModel
from prism_trt.target.tokenizer import Tokenizer, TokenizerSettings

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "The quick brown fox jumps over the lazy dog; the dog sleeps. Numbers: 0 1 2 3 4 5 6 7 8 9. Größe, 東京, 🙂!"


@cache
def tiny_tokenizer(vocab_size: int = 320) -> Tokenizer:
    """A byte-level BPE tokenizer trained on one sentence, padded with unused tokens to `vocab_size`."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([TEXT], trainer)
    fast.add_tokens([f"<unused{i}>" for i in range(vocab_size - fast.get_vocab_size())])
    eos = fast.token_to_id("<|im_end|>")
    return Tokenizer(fast, TokenizerSettings(chat_template=CHAT_TEMPLATE, eos_token="<|im_end|>", eos_token_ids=(eos,)))


def tiny_config(**overrides: Any) -> TargetConfig:
    """A GQA config of 2 layers; `overrides` are its fields."""
    fields: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "qkv_bias": False,
        "max_position_embeddings": 512,
        "eos_token_ids": (2,),
        "bos_token_id": None,
    }
    return TargetConfig(**{**fields, **overrides})


def tiny_target(seed: int = 0, **overrides: Any) -> Target:
    """A random target; weights are large enough for its greedy output not to be one repeated token."""
    config = tiny_config(**overrides)
    generator = torch.Generator().manual_seed(seed)
    model = LlamaModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                scale = 1.0 if "embed" in name or "lm_head" in name else 2.0 / parameter.shape[-1] ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return Target(config, model.requires_grad_(False).eval(), tiny_tokenizer(config.vocab_size), Path("tiny"))


DRAFTERS: dict[str, dict[str, Any]] = {
    "one module": {"modules": 1},
    "two modules": {"modules": 2},
    "three modules": {"modules": 3},
    "bias": {"modules": 2, "fc_bias": True},
    "multi": {"modules": 2, "features": "multi", "feature_layers": (0, 1, 1)},
    "normalized": {"modules": 2, "features": "multi", "feature_layers": (0, 1, 1), "normalize_features": True},
    "two layers": {"modules": 2, "num_layers": 2},
    "standard": {
        "modules": 1,
        "kind": "standard",
        "features": "none",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
    },
}


def tiny_drafter(
    target: Target,
    modules: int = 2,
    seed: int = 1,
    step_map: tuple[int, ...] | None = None,
    draft_vocab_size: int | None = 200,
    **overrides: Any,
) -> Drafter:
    """A random drafter for `target`, with a random draft vocabulary of `draft_vocab_size` tokens (None: all).

    `overrides` are fields of its config; `DRAFTERS` has one set for each shape a drafter can have.
    """
    config = target.config
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "num_modules": modules,
        "step_map": step_map or tuple(range(modules)),
        "draft_vocab_size": draft_vocab_size,
        "target_fingerprint": target.fingerprint,
    }
    vocab = None
    if draft_vocab_size is not None:
        vocab = torch.randperm(config.vocab_size, generator=generator)[:draft_vocab_size].sort().values
    drafter = Drafter(DrafterConfig(**{**fields, **overrides}), vocab, config.vocab_size)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return drafter.requires_grad_(False).eval()
