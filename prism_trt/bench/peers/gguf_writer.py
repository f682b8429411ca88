"""Write a target as a BF16 GGUF file for llama.cpp (no tokenizer: peers exchange token ids)."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from torch import Tensor

from prism_trt.manifest import atomic_file
from prism_trt.target.config import TargetConfig
from prism_trt.target.loading import Target
from prism_trt.target.model import rope_frequencies

_GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """GGUF spelling of a Hugging Face parameter name."""
    stem, _, leaf = name.rpartition(".")
    if stem in _GLOBAL:
        return f"{_GLOBAL[stem]}.{leaf}"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{_LAYER[part]}.{leaf}"


def interleave_heads(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection [heads * D, ...] for llama.cpp's rotary layout.

    Hugging Face rotates row i of a head with row i + D/2; llama.cpp's `llama` architecture rotates neighbours, so the
    rows of each head become 0, D/2, 1, D/2 + 1, ...
    """
    half = weight.shape[0] // heads // 2
    rest = weight.shape[1:]
    return weight.reshape(heads, 2, half, *rest).transpose(1, 2).reshape(weight.shape)


def write_gguf(target: Target, path: Path) -> None:
    """Write matrices as BF16 and vectors as float32, atomically."""
    with atomic_file(path) as temporary:
        writer = GGUFWriter(temporary, "llama")
        _write_settings(writer, target.config)
        for name, tensor in target.model.state_dict().items():
            _write_tensor(writer, name, tensor, target.config)
        if target.config.rope_scaling is not None:
            plain = rope_frequencies(target.config.model_copy(update={"rope_scaling": None}))
            writer.add_tensor("rope_freqs.weight", (plain / rope_frequencies(target.config)).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _write_settings(writer: GGUFWriter, config: TargetConfig) -> None:
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)


def _write_tensor(writer: GGUFWriter, name: str, tensor: Tensor, config: TargetConfig) -> None:
    if "q_proj" in name:
        tensor = interleave_heads(tensor, config.num_heads)
    elif "k_proj" in name:
        tensor = interleave_heads(tensor, config.num_kv_heads)
    values = tensor.detach().to(torch.float32).contiguous().numpy()
    if tensor.dim() == 1:
        writer.add_tensor(gguf_name(name), values)
    else:
        kind = GGMLQuantizationType.BF16
        writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)
