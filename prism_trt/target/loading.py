"""Load targets from Hugging Face directories and GGUF files."""

from __future__ import annotations

import contextlib
import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prism_trt.errors import PrismError
from prism_trt.manifest import sha256_json
from prism_trt.target.config import TargetConfig
from prism_trt.target.model import LlamaModel
from prism_trt.target.tokenizer import Tokenizer, TokenizerSettings, load_hf_tokenizer

WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE = "model.safetensors", "model.safetensors.index.json", "config.json"


@dataclass(frozen=True)
class Target:
    """A loaded target."""

    config: TargetConfig
    model: LlamaModel
    tokenizer: Tokenizer
    path: Path

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of config and tokenizer: what a drafter must have been trained for."""
        return sha256_json([self.config.model_dump(mode="json"), self.tokenizer.fingerprint])


def load_target(path: Path, dtype: torch.dtype | None = torch.float32) -> Target:
    """Load a Hugging Face directory or a GGUF file; weights of type `dtype` on the CPU, without gradients.

    None keeps the types that are stored: the weights of a directory are then mapped files, read when they are used.

    Raises:
        PrismError: the path does not exist, the model is not of the LLaMA family, or a file is missing or damaged.
    """
    path = Path(path)
    if path.is_dir():
        target = _load_directory(path, dtype)
    elif path.is_file():
        target = _load_gguf(path, dtype)
    else:
        raise PrismError(f"{path} does not exist: pass a Hugging Face model directory or a GGUF file")
    if target.tokenizer.vocab_size > target.config.vocab_size:
        raise PrismError(
            f"{path}: the tokenizer has {target.tokenizer.vocab_size} tokens but the model only "
            f"{target.config.vocab_size}: use the model's own tokenizer"
        )
    return target


def save_hf(target: Target, directory: Path) -> None:
    """Write the target as a Hugging Face directory that `load_target` reads back with the same fingerprint."""
    directory = Path(directory)
    target.tokenizer.save(directory)
    settings = target.tokenizer.settings
    for_transformers = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: getattr(settings, name) for name in ("chat_template", "bos_token", "eos_token")},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(for_transformers, indent=2) + "\n")
    (directory / CONFIG_FILE).write_text(json.dumps(target.config.to_hf(), indent=2) + "\n")
    state = {name: tensor.contiguous() for name, tensor in target.model.state_dict().items()}
    save_file(state, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def _load_directory(path: Path, dtype: torch.dtype | None) -> Target:
    config_file = path / CONFIG_FILE
    if not config_file.is_file():
        raise PrismError(f"{path} has no {CONFIG_FILE}: pass a Hugging Face model directory or a GGUF file")
    try:
        values = json.loads(config_file.read_text())
    except ValueError as error:
        raise PrismError(f"{config_file} is not valid JSON: {error}") from None
    config = TargetConfig.from_hf(values, str(config_file))
    tokenizer = load_hf_tokenizer(path, config.eos_token_ids)
    return Target(config, _fill(config, _tensors(path), path, dtype), tokenizer, path)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the directory's safetensors files, one at a time."""
    files = [path / WEIGHTS_FILE]
    if not files[0].is_file():
        if not (path / INDEX_FILE).is_file():
            raise PrismError(
                f"{path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: only safetensors weights are supported"
            )
        try:
            names = json.loads((path / INDEX_FILE).read_text())["weight_map"].values()
        except (ValueError, KeyError, AttributeError):
            raise PrismError(f"{path / INDEX_FILE} is not a valid index: download the model again") from None
        files = [path / name for name in sorted(set(names))]
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name)
        except FileNotFoundError:
            raise PrismError(f"{file} does not exist: download the model again") from None
        except SafetensorError as error:
            raise PrismError(f"{file} is truncated or damaged ({error}): download the model again") from None


def _fill(
    config: TargetConfig, tensors: Iterator[tuple[str, Tensor]], path: Path, dtype: torch.dtype | None
) -> LlamaModel:
    """A model with every parameter taken from `tensors`, names and shapes checked."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in LlamaModel(config).state_dict().items()}
    state = {}
    for name, tensor in tensors:
        if (name == "lm_head.weight" and config.tie_word_embeddings) or name.endswith("rotary_emb.inv_freq"):
            continue
        if name not in expected:
            raise PrismError(f"{path} holds an unexpected tensor {name}: it is not a plain LLaMA-family model")
        if tensor.shape != expected[name]:
            raise PrismError(
                f"{path}: {name} has shape {list(tensor.shape)}, but the config says {list(expected[name])}"
            )
        state[name] = tensor if dtype is None else tensor.to(dtype)
    if missing := expected.keys() - state.keys():
        raise PrismError(f"{path} lacks the tensor {min(missing)}: download the model again")
    return LlamaModel.from_state(config, state)


def _load_gguf(path: Path, dtype: torch.dtype | None) -> Target:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise PrismError(f"{path} is not a GGUF file: pass a Hugging Face model directory or a GGUF file")
    try:
        import accelerate  # noqa: F401  (transformers' GGUF loader needs it)
        import gguf  # noqa: F401
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise PrismError(f"reading {path} needs {error.name}: pip install 'prism_trt[gguf]'") from None
    folder, name = str(path.parent), path.name
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' progress bar cannot be turned off
            config = TargetConfig.from_hf(AutoConfig.from_pretrained(folder, gguf_file=name).to_dict(), str(path))
            loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
            wrapped = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (ValueError, OSError, KeyError, IndexError, struct.error, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PrismError(f"{path} is truncated, damaged or not supported ({reason}): download the file again") from None
    settings = TokenizerSettings(
        chat_template=wrapped.chat_template,
        bos_token=wrapped.bos_token,
        eos_token=wrapped.eos_token,
        eos_token_ids=config.eos_token_ids,
    )
    model = _fill(config, iter(loaded.state_dict().items()), path, dtype)
    return Target(config, model, Tokenizer(wrapped.backend_tokenizer, settings), path)
