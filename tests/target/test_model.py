"""The graph against transformers, and the pool against whole sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from prism_trt.engines.protocol import TokenBatch
from prism_trt.target.loading import Target, load_target
from prism_trt.target.model import KVPool
from tests.tiny import tiny_target, tiny_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama2": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "smollm2": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "tinyllama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2, "head_dim": 32}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    config_class, model_class, options = FAMILIES[family]
    torch.manual_seed(0)
    reference = model_class(config_class(**SHAPE, **options)).eval()
    for name, parameter in reference.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)  # Qwen2 initialises them to zero, which would hide a missing bias
    reference.save_pretrained(tmp_path)
    tiny_tokenizer().save(tmp_path)
    target = load_target(tmp_path)
    tokens = torch.randint(0, 320, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(tokens, output_hidden_states=True)
        features = target.model.forward_sequence(tokens)
    torch.testing.assert_close(features, expected.hidden_states[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target.model.head(features), expected.logits, rtol=1e-4, atol=1e-5)


def test_smollm2_equals_transformers(smollm2: Target) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        str(smollm2.path.parent), gguf_file=smollm2.path.name, dtype=torch.float32
    )
    tokens = torch.tensor([smollm2.tokenizer.encode_chat([{"role": "user", "content": "Why is the sky blue?"}])])
    with torch.no_grad():
        expected = reference(tokens).logits
        actual = smollm2.model.head(smollm2.model.forward_sequence(tokens))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def _pool(target: Target, slots: int = 3) -> KVPool:
    shape = target.config
    return KVPool.allocate(
        shape.num_layers, slots, shape.num_kv_heads, 64, shape.head_dim, torch.float32, torch.device("cpu")
    )


def test_pool_gives_what_the_whole_sequence_gives() -> None:
    target = tiny_target()
    tokens = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(2))
    expected = target.model.forward_sequence(tokens)
    pool = _pool(target)
    slots = torch.tensor([2, 0])
    at = torch.tensor([0, 0])
    # Chunks of different sizes per row; the shorter row is padded.
    for counts in ([8, 3], [5, 9], [7, 8]):
        taken = torch.tensor(counts)
        longest = max(counts)
        rows = [tokens[b, at[b] : at[b] + counts[b]] for b in range(2)]
        padded = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
        batch = TokenBatch(padded, at[:, None] + torch.arange(longest), slots, at, taken)
        with torch.no_grad():
            features, _ = target.model(batch, pool)
        for b in range(2):
            torch.testing.assert_close(
                features[b, : counts[b]], expected[b, at[b] : at[b] + counts[b]], rtol=1e-4, atol=1e-4
            )
        at = at + taken
    assert at.tolist() == [20, 20]


def test_a_path_in_a_tree_reads_its_ancestors_only() -> None:
    target = tiny_target()
    prompt, path = [5, 6, 7, 8], [9, 10, 11]
    expected = target.model.forward_sequence(torch.tensor([prompt + path]))[0, 4:]
    pool = _pool(target)
    zero = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        target.model(TokenBatch(torch.tensor([prompt]), torch.arange(4)[None], zero, zero, zero + 4), pool)
        # 9 with the siblings 99 and 10; 10 with the child 11: nodes 0, 2, 4 are the path
        mask = torch.tensor(
            [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 1, 0, 1]]
        ).bool()
        depths = torch.tensor([[4, 4, 5, 5, 6]])
        tree = TokenBatch(torch.tensor([[9, 99, 10, 98, 11]]), depths, zero, zero + 4, zero + 5, mask[None])
        features, _ = target.model(tree, pool)
    torch.testing.assert_close(features[0, [0, 2, 4]], expected, rtol=1e-4, atol=1e-4)
