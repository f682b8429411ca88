"""Drafter checkpoints: a directory with ``config.json`` and ``model.safetensors``.

Tensors are named ``modules.{m}.fc.weight`` and ``modules.{m}.layer.*`` in Hugging Face spelling (``layers.{i}.*`` where
a module has several), plus ``fusion.weight`` for multi features and ``draft_vocab`` when the drafter predicts a part of
the vocabulary. Embedding, head and final norm are the target's and are not stored; only the kind `standard` has its
own: ``embed_tokens.weight``, ``lm_head.weight`` and ``modules.0.norm.weight``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prism_trt.config import DrafterConfig, parse_json_file
from prism_trt.drafter.model import Drafter
from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_directory, has_only
from prism_trt.target.loading import Target

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_VOCAB = "draft_vocab"


def drafter_tensors(drafter: Drafter) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, sharing memory with `drafter`."""
    tensors = {_stored_name(name, drafter.config): value for name, value in drafter.state_dict().items()}
    if drafter.draft_vocab is not None:
        tensors[_VOCAB] = drafter.draft_vocab
    return tensors


def _stored_name(name: str, config: DrafterConfig) -> str:
    name = name.replace("modules_.", "modules.", 1)
    return name.replace(".layers.0.", ".layer.", 1) if config.num_layers == 1 else name


def weights_sha256(drafter: Drafter) -> str:
    """Hex SHA-256 of a drafter's tensors, names and dtypes included."""
    digest = hashlib.sha256()
    for name, value in sorted(drafter_tensors(drafter).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_drafter(drafter: Drafter, directory: Path, overwrite: bool = False) -> None:
    """Write `drafter` to `directory` atomically, with the dtype its parameters have.

    Raises:
        PrismError: `directory` exists, is not empty, and `overwrite` is false.
    """
    with atomic_directory(directory, overwrite, has_only(WEIGHTS_FILE, CONFIG_FILE)) as temporary:
        tensors = {name: value.detach().cpu().contiguous() for name, value in drafter_tensors(drafter).items()}
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / CONFIG_FILE).write_text(drafter.config.model_dump_json(indent=2) + "\n")


def load_drafter(directory: Path, target: Target | None = None, dtype: torch.dtype = torch.float32) -> Drafter:
    """Read a drafter, its parameters converted to `dtype`; `target`, when given, must be the one it was trained for.

    Raises:
        PrismError: a file is missing, truncated or invalid; a tensor is missing, unknown or of the wrong shape; or the
            drafter was trained for another target or tokenizer.
    """
    directory = Path(directory)
    if not (directory / CONFIG_FILE).is_file():
        raise PrismError(f"{directory} has no {CONFIG_FILE}: pass a drafter directory written by prism-trt train")
    config = parse_json_file(DrafterConfig, directory / CONFIG_FILE)
    if target is not None:
        _require_target(config, target, directory)
    path = directory / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise PrismError(f"{path} cannot be read ({error}): copy or train the drafter again") from None

    vocab = tensors.pop(_VOCAB, None)
    _require_vocab(vocab, config, path)
    vocab_size = len(tensors["embed_tokens.weight"]) if "embed_tokens.weight" in tensors else 1
    with torch.device("meta"):
        empty = Drafter(config, None if vocab is None else vocab.to("meta"), vocab_size)
    _require_tensors(tensors, {k: v for k, v in drafter_tensors(empty).items() if k != _VOCAB}, path)
    if target is not None and config.kind == "standard" and vocab_size != target.config.vocab_size:
        raise PrismError(
            f"{path} embeds {vocab_size} tokens but the target has {target.config.vocab_size}: train again"
        )
    drafter = Drafter(config, vocab, vocab_size).to(dtype)
    drafter.load_state_dict({name: tensors[_stored_name(name, config)] for name in drafter.state_dict()})
    return drafter.eval()


def _require_target(config: DrafterConfig, target: Target, directory: Path) -> None:
    if config.target_fingerprint != target.fingerprint:
        raise PrismError(
            f"the drafter {directory} was trained for another target or tokenizer (fingerprint "
            f"{config.target_fingerprint[:12]}, but {target.path} has {target.fingerprint[:12]}): pass the target it "
            "was trained for, or train a new drafter"
        )


def _require_vocab(vocab: Tensor | None, config: DrafterConfig, path: Path) -> None:
    size = None if vocab is None else len(vocab)
    if size != config.draft_vocab_size:
        raise PrismError(
            f"{path} has a draft vocabulary of {size} tokens but its config says {config.draft_vocab_size}: train again"
        )
    if vocab is not None and (vocab.dtype != torch.int64 or vocab.dim() != 1 or bool((vocab.diff() <= 0).any())):
        raise PrismError(
            f"the draft_vocab in {path} is not an ascending list of int64 token ids: train the drafter again"
        )


def _require_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    for name, value in expected.items():
        if name not in tensors:
            raise PrismError(f"{path} lacks the tensor {name}: the file and its {CONFIG_FILE} do not belong together")
        if tensors[name].shape != value.shape:
            raise PrismError(
                f"{path}: {name} has shape {list(tensors[name].shape)} but the config needs {list(value.shape)}: "
                f"the file and its {CONFIG_FILE} do not belong together"
            )
    if unknown := sorted(set(tensors) - set(expected)):
        raise PrismError(f"{path} holds the unknown tensor {unknown[0]}: it is not a drafter of this version")
