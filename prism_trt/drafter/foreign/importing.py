"""Turn drafters of EAGLE-1/2, HASS and the PRISM artifact into drafters of this project.

They compute what a `Drafter` computes; only names differ, and one parameter: the PRISM artifact's ``fusion_layer`` has
a bias, which is moved into the fc that follows it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_trt.config import DrafterConfig, parse
from prism_trt.drafter.features import multi_layers
from prism_trt.drafter.foreign.layouts import EAGLE, PRISM, Layout, recognise
from prism_trt.drafter.foreign.reading import CONFIG_FILE, ForeignFiles, read_files
from prism_trt.drafter.model import Drafter
from prism_trt.errors import PrismError
from prism_trt.target.config import TargetConfig
from prism_trt.target.loading import Target

_ROTARY_CACHE = re.compile(r"(?:.+\.)?rotary_emb\.(?:inv_freq|cos_cached|sin_cached)")
_COMPARED_ROWS = 4096
_FREE = ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps")
"""Fields in which a drafter need not agree with its target."""


@dataclass(frozen=True)
class ImportChoices:
    """What a file does not say; None leaves it to the rules of `import_drafter`."""

    kind: str | None = None
    step_map: tuple[int, ...] | None = None
    feature_layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ImportedDrafter:
    """A drafter and what its user should know about it."""

    drafter: Drafter
    layout: Layout
    notes: list[str]
    """Where the drafter's own config differs from its weights or from the target; one sentence each."""


def import_drafter(source: Path, target: Target, choices: ImportChoices) -> ImportedDrafter:
    """Read the drafter in directory `source`, with the dtypes of its file.

    Where `choices` leaves it open, the kind is `prism` for several modules, `eagle2` for a file of EAGLE's layout (a
    HASS drafter is the same network) and `hass` otherwise; the step map is the config's ``step_mapping`` or step k to
    module min(k, M-1); three fused hidden states are numbers 3, L/2 + 1 and L - 2.

    Raises:
        PrismError: the directory holds no such drafter, holds one of another architecture or another target, lacks a
            tensor, or holds one that is unknown.
    """
    files = read_files(source)
    tensors = {name: value for name, value in files.tensors.items() if not _ROTARY_CACHE.fullmatch(name)}
    layout = recognise(tensors.keys(), str(files.weights))
    shape = TargetConfig.from_hf(files.config.get("eagle_config", files.config), str(Path(source) / CONFIG_FILE))
    notes = _compare(shape, target, source)
    _take_tables(tensors, target, files.weights)
    if layout is PRISM:
        _take_aliases(tensors, files.weights)
    notes += _check_bias(_has_bias(layout, tensors), files)
    config = _drafter_config(layout, tensors, shape, target, files, choices)
    if (bias := tensors.pop("fusion_layer.bias", None)) is not None and bool(bias.any()):
        config = _move_fusion_bias(tensors, bias, layout, config, files.weights)
    return ImportedDrafter(_fill(config, tensors, layout, files.weights), layout, notes)


def _compare(shape: TargetConfig, target: Target, source: Path) -> list[str]:
    """Refuse a drafter of other sizes than the target's; note what it is free to have of its own."""
    own, theirs = shape.model_dump(), target.config.model_dump()
    for name in ("hidden_size", "vocab_size"):
        if own[name] != theirs[name]:
            raise PrismError(
                f"the drafter {source} has {name} {own[name]}, but {target.path} has {theirs[name]}: pass the target "
                "it was trained for"
            )
    return [
        f"{name} is {own[name]} in the drafter's config but {theirs[name]} in the target's; the drafter keeps its own"
        for name in _FREE
        if own[name] != theirs[name]
    ]


def _take_tables(tensors: dict[str, Tensor], target: Target, path: Path) -> None:
    """Remove the copies of the target's embedding and head, after comparing them: they tell whose drafter this is."""
    if "embed_tokens.weight" not in tensors:
        raise PrismError(f"{path} lacks embed_tokens.weight, which tells its target: pass the file as it was published")
    tables = {"embed_tokens.weight": target.model.model.embed_tokens.weight, "lm_head.weight": target.model.head_weight}
    for name, expected in tables.items():
        if (found := tensors.pop(name, None)) is not None and (differing := _differing_rows(found, expected)):
            raise PrismError(
                f"{name} in {path} differs from the target's in {differing} of {len(expected)} rows: pass the very "
                f"target it was trained for, neither fine-tuned nor quantised, instead of {target.path}"
            )


def _differing_rows(found: Tensor, expected: Tensor) -> int:
    """Rows of `found` that are not those of `expected` rounded to its dtype."""
    if found.shape != expected.shape:
        return len(expected)
    limits = torch.finfo(found.dtype)
    pieces = zip(found.split(_COMPARED_ROWS), expected.split(_COMPARED_ROWS), strict=True)
    return sum(
        int((~torch.isclose(a.float(), b.float(), limits.eps, limits.tiny * limits.eps).all(dim=1)).sum())
        for a, b in pieces
    )


def _take_aliases(tensors: dict[str, Tensor], path: Path) -> None:
    """Remove the second names that the module has which was active when a PRISM checkpoint was saved."""
    aliases = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("layers.", "fc."))}

    def equals(module: int) -> bool:
        prefixes = {"layers": f"stepModels.{module}", "fc": PRISM.fc.format(module=module)}
        for name, value in aliases.items():
            first, _, rest = name.partition(".")
            other = tensors.get(f"{prefixes[first]}.{rest}")
            if other is None or other.dtype != value.dtype or not torch.equal(other, value):
                return False
        return True

    if not any(equals(module) for module in range(PRISM.count_modules(tensors.keys()))):
        raise PrismError(
            f"the tensors layers.* and fc.* in {path} equal none of its modules, so which weights count is unknown: "
            "save stepModels and stepFCs alone"
        )


def _has_bias(layout: Layout, tensors: dict[str, Tensor]) -> bool:
    return layout.translate("modules_.0.fc.bias") in tensors


def _check_bias(has_bias: bool, files: ForeignFiles) -> list[str]:
    """Compare the file, which decides, with the config's top-level key `bias`, without which EAGLE assumes a bias."""
    stated = files.config.get("bias")
    name = files.weights.name
    if stated is True and not has_bias:
        raise PrismError(f"{files.weights} has no bias of fc, but {CONFIG_FILE} says bias: download the drafter again")
    if stated is False and has_bias:
        return [f"{CONFIG_FILE} says that fc has no bias, but {name} has one, trained with the rest: it is kept"]
    if stated is None and not has_bias:
        return [
            f"{CONFIG_FILE} has no key bias, which in EAGLE means that fc has one, but {name} has none: none is used"
        ]
    return []


def _drafter_config(
    layout: Layout,
    tensors: dict[str, Tensor],
    shape: TargetConfig,
    target: Target,
    files: ForeignFiles,
    choices: ImportChoices,
) -> DrafterConfig:
    names = tensors.keys()
    modules, layers = layout.count_modules(names), layout.count_layers(names)
    if layers != shape.num_layers:
        raise PrismError(
            f"{files.weights} has {layers} layers, but its {CONFIG_FILE} says num_hidden_layers {shape.num_layers}: "
            "pass files that belong together"
        )
    multi = "fusion_layer.weight" in names
    if choices.feature_layers and not multi:
        raise PrismError(
            f"{files.weights} has no fusion_layer, so the drafter is fed the last hidden state: leave out feature "
            "layers"
        )
    feature_layers = (choices.feature_layers or _artifact_layers(target.config.num_layers)) if multi else ()
    if any(not 0 <= number <= target.config.num_layers for number in feature_layers):
        raise PrismError(
            f"feature layers {list(feature_layers)} are not all among the target's 0..{target.config.num_layers}: pass "
            "those the drafter was trained with"
        )
    kind = "prism" if modules > 1 else "eagle2" if layout is EAGLE else "hass"
    fields = {
        **{name: getattr(shape, name) for name in ("hidden_size", "intermediate_size", "num_layers", *_FREE)},
        "kind": choices.kind or kind,
        "num_modules": modules,
        "step_map": choices.step_map or _step_mapping(files) or tuple(range(modules)),
        "features": "multi" if multi else "last",
        "feature_layers": feature_layers,
        # The artifact recomputes all K/V with the module of the step in training, and not in serving.
        "kv_mode": "current" if modules > 1 else "producer",
        "fc_bias": _has_bias(layout, tensors),
        "target_fingerprint": target.fingerprint,
        "provenance": {"imported": {"layout": layout.name, "sha256": files.sha256}},
    }
    return parse(DrafterConfig, fields, str(files.weights))


def _artifact_layers(num_layers: int) -> tuple[int, ...]:
    """Hidden states 3, L/2 + 1 and L - 2, which the artifact fuses: one layer after EAGLE-3's.

    Source: ``set_eagle3_layers_to_capture`` in the artifact's SGLang (``models/llama.py``).
    """
    if num_layers < 6:
        raise PrismError(
            f"the PRISM artifact has no rule for which hidden states of a target of {num_layers} layers are fused: "
            "pass --feature-layers"
        )
    return tuple(number + 1 for number in multi_layers(num_layers))


def _step_mapping(files: ForeignFiles) -> tuple[int, ...]:
    """The step map in the config of a PRISM training run, ``{"0": 0, "1": 1, "2": 1}``; empty without one."""
    mapping: dict[str, Any] = files.config.get("step_mapping", {})
    try:
        return tuple(int(mapping[str(step)]) for step in range(len(mapping)))
    except (KeyError, TypeError, ValueError):
        raise PrismError(
            f"step_mapping in {files.weights.parent / CONFIG_FILE} does not map steps 0, 1, 2, ... to modules: pass "
            "--step-map"
        ) from None


def _move_fusion_bias(
    tensors: dict[str, Tensor], bias: Tensor, layout: Layout, config: DrafterConfig, path: Path
) -> DrafterConfig:
    """Add what a fusion layer's bias [H] contributes to fc [H, 2H] of step 0 to that fc's own bias, as ours has none.

    fc [e, W f + b] = fc [e, W f] + fc[:, H:] b. Later steps feed no fused states, so their modules must be others.
    """
    first = config.step_map[0]
    if first in (config.step_map[1:] or config.step_map):
        raise PrismError(
            f"fusion_layer.bias in {path} cannot be moved into fc of module {first}, because that module serves later "
            "steps too: pass a --step-map where it serves step 0 only"
        )
    if not config.fc_bias:
        for module in range(config.num_modules):
            tensors[layout.translate(f"modules_.{module}.fc.bias")] = torch.zeros_like(bias)
    weight, name = (layout.translate(f"modules_.{first}.fc.{part}") for part in ("weight", "bias"))
    added = tensors[weight][:, len(bias) :].float() @ bias.float()
    tensors[name] = (tensors[name].float() + added).to(tensors[name].dtype)
    return parse(DrafterConfig, config.model_dump() | {"fc_bias": True}, str(path))


def _fill(config: DrafterConfig, tensors: dict[str, Tensor], layout: Layout, path: Path) -> Drafter:
    """A drafter of the file's tensors, with every name and shape checked."""
    drafter = Drafter(config)
    state = {}
    for ours, expected in drafter.state_dict().items():
        name = layout.translate(ours)
        if name not in tensors:
            raise PrismError(f"{path} lacks the tensor {name}: download the drafter again")
        if tensors[name].shape != expected.shape:
            raise PrismError(
                f"{path}: {name} has shape {list(tensors[name].shape)}, but its {CONFIG_FILE} says "
                f"{list(expected.shape)}: pass files that belong together"
            )
        state[ours] = tensors.pop(name)
    if tensors:
        raise PrismError(f"{path} holds the tensor {min(tensors)}, which no EAGLE-1/2, HASS or PRISM drafter has")
    drafter.load_state_dict(state, assign=True)
    return drafter.requires_grad_(False).eval()
