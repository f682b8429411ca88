"""Write a target of LLaMA-3-8B's shape with random bfloat16 weights, and a random PRISM drafter for it.

``python scripts/write_random_model.py --out models/random-8b`` writes ``target`` (a Hugging Face directory in shards)
and ``drafter``: enough to measure what building an engine of that size takes. No two tensors are equal, because
TensorRT stores equal constants once. About 17 GB; needs 2 GB of memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from prism_trt.config import DrafterConfig
from prism_trt.drafter.checkpoint import CONFIG_FILE as DRAFTER_CONFIG
from prism_trt.drafter.checkpoint import WEIGHTS_FILE as DRAFTER_WEIGHTS
from prism_trt.drafter.checkpoint import drafter_tensors
from prism_trt.drafter.model import Drafter
from prism_trt.manifest import atomic_directory
from prism_trt.target.config import TargetConfig
from prism_trt.target.loading import CONFIG_FILE, INDEX_FILE, Target
from prism_trt.target.model import LlamaModel
from prism_trt.target.tokenizer import Tokenizer, TokenizerSettings

LLAMA_3_8B = TargetConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=False,
    qkv_bias=False,
    max_position_embeddings=8192,
    eos_token_ids=(256,),
    bos_token_id=None,
)
_LAYERS_OF_A_SHARD = 4


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and one that ends a turn."""
    words = {word: number for number, word in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = FastTokenizer(models.BPE(words, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|end|>"])
    template = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
    return Tokenizer(fast, TokenizerSettings(chat_template=template, eos_token="<|end|>", eos_token_ids=(256,)))


def random_weights(shapes: Mapping[str, torch.Size], generator: torch.Generator) -> dict[str, Tensor]:
    """bfloat16 tensors: ones for vectors, else numbers of random sign and between 1/128 and 1/32 in size."""
    return {name: _random(shape, generator) for name, shape in shapes.items()}


def _random(shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    # Sign, lowest bit of the exponent and mantissa are random; the rest of the exponent makes it 2^-7 or 2^-6.
    bits = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)
    return bits.bitwise_and_(~0x7F00).bitwise_or_(0x3C00).view(torch.bfloat16)


def _shards(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Names of tensors that go into a file together: a few layers, or what belongs to none."""

    def shard(name: str) -> str:
        parts = name.split(".")
        return str(int(parts[2]) // _LAYERS_OF_A_SHARD) if parts[1] == "layers" else name

    for _, names in groupby(shapes, shard):
        yield list(names)


def write_target(config: TargetConfig, directory: Path, generator: torch.Generator) -> Target:
    """Write a Hugging Face directory; the target that is returned has no weights."""
    with torch.device("meta"):
        model = LlamaModel(config)
    target = Target(config, model, byte_tokenizer(), directory)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with atomic_directory(directory) as temporary:
        target.tokenizer.save(temporary)
        template = {"chat_template": target.tokenizer.settings.chat_template, "eos_token": "<|end|>"}
        (temporary / "tokenizer_config.json").write_text(json.dumps(template))
        (temporary / CONFIG_FILE).write_text(json.dumps(config.to_hf(), indent=2))
        files: dict[str, str] = {}
        for number, names in enumerate(_shards(shapes)):
            file = f"model-{number:05d}.safetensors"
            save_file(random_weights({name: shapes[name] for name in names}, generator), temporary / file)
            files |= dict.fromkeys(names, file)
        (temporary / INDEX_FILE).write_text(json.dumps({"weight_map": files}))
    return target


def write_drafter(target: Target, directory: Path, draft_words: int, generator: torch.Generator) -> None:
    """Write a PRISM drafter of two modules that predicts the first `draft_words` words."""
    shared = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rms_norm_eps", "rope_theta")
    fields = {name: getattr(target.config, name) for name in shared}
    config = DrafterConfig(
        kind="prism",
        num_modules=2,
        step_map=(0, 1),
        draft_vocab_size=draft_words,
        target_fingerprint=target.fingerprint,
        **fields,
    )
    vocab = torch.arange(draft_words)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in drafter_tensors(Drafter(config, vocab)).items()}
    with atomic_directory(directory) as temporary:
        weights = random_weights(shapes, generator) | {"draft_vocab": vocab}
        save_file(weights, temporary / DRAFTER_WEIGHTS)
        (temporary / DRAFTER_CONFIG).write_text(config.model_dump_json(indent=2))


def write(
    out: Annotated[Path, typer.Option(help="Directory to write `target` and `drafter` into.")],
    layers: Annotated[int, typer.Option(min=1, help="Layers of the target.")] = LLAMA_3_8B.num_layers,
    draft_words: Annotated[int, typer.Option(min=1, help="Words that the drafter predicts.")] = 32000,
) -> None:
    """Write the two models."""
    generator = torch.Generator().manual_seed(0)
    target = write_target(LLAMA_3_8B.model_copy(update={"num_layers": layers}), out / "target", generator)
    write_drafter(target, out / "drafter", draft_words, generator)


if __name__ == "__main__":
    typer.run(write)
