"""What training starts from: a new drafter, or a finished one (`--init`) whose shape then counts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from prism_trt.config import DrafterConfig, TrainConfig, parse
from prism_trt.drafter.checkpoint import load_drafter
from prism_trt.drafter.features import multi_layers
from prism_trt.drafter.model import Drafter
from prism_trt.errors import PrismError
from prism_trt.target.loading import Target
from prism_trt.train.stages import stages

_FIELDS = {
    "features": "features",
    "kv_mode": "kv_mode",
    "layers": "num_layers",
    "width": "hidden_size",
    "draft_vocab_size": "draft_vocab_size",
    "intermediate_size": "intermediate_size",
}
"""Options that a finished drafter has decided, and where its config says so."""


def new_shape(target: Target, config: TrainConfig) -> DrafterConfig:
    """The config of a new drafter of one module; all but a standard one have the target's width and heads.

    Raises:
        PrismError: the target has no heads of the wanted width.
    """
    shape = target.config
    is_lm = config.kind == "standard"
    width = config.width or shape.hidden_size
    if width % shape.head_dim:
        raise PrismError(
            f"--width {width} is not a multiple of the target's head width {shape.head_dim}: choose one that is"
        )
    heads = shape.num_heads * width // shape.hidden_size if width == shape.hidden_size else width // shape.head_dim
    inner = config.intermediate_size or round(shape.intermediate_size * width / shape.hidden_size / 16) * 16
    if not config.intermediate_size and width == shape.hidden_size:
        inner = shape.intermediate_size
    multi = config.features == "multi"
    return DrafterConfig(
        kind="standard" if is_lm else "prism",
        hidden_size=width,
        intermediate_size=inner,
        num_layers=config.layers,
        num_heads=heads,
        num_kv_heads=max(g for g in range(1, shape.num_kv_heads + 1) if heads % g == 0),
        head_dim=shape.head_dim,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        rope_scaling=shape.rope_scaling,
        num_modules=1,
        step_map=(0,),
        features="none" if is_lm else config.features,
        feature_layers=multi_layers(shape.num_layers) if multi else (),
        # Residual streams differ in size from layer to layer, and have a few enormous entries at the first token.
        normalize_features=multi,
        kv_mode=config.kv_mode,
        draft_vocab_size=config.draft_vocab_size if 0 < config.draft_vocab_size < shape.vocab_size else None,
        target_fingerprint=target.fingerprint,
    )


def new_drafter(target: Target, config: TrainConfig, vocab: Tensor | None) -> Drafter:
    """A randomly initialised drafter of one module.

    Raises:
        PrismError: as `new_shape`.
    """
    shape = new_shape(target, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Drafter(shape, vocab, target.config.vocab_size)


def load_init(directory: Path, target: Target, config: TrainConfig) -> tuple[Drafter, TrainConfig]:
    """The drafter in `directory`, and `config` with its shape wherever that sets none itself.

    A K/V mode that `config` sets is applied, because it changes no weights.

    Raises:
        PrismError: the drafter cannot be read, has another shape than `config` sets, or is not what its stages can
            train.
    """
    drafter = load_drafter(directory, target)
    config = _with_shape(config, drafter.config, target)
    check_init(drafter.config, config)
    drafter.config = parse(DrafterConfig, drafter.config.model_dump() | {"kv_mode": config.kv_mode}, str(directory))
    return drafter, config


def check_init(init: DrafterConfig, config: TrainConfig) -> None:
    """Require that the stages of `config` can train `init`.

    Raises:
        PrismError: they cannot.
    """
    if init.num_modules > 1:
        others = any(stage.updates for stage in stages(config) if stage.name != "tuning")
        same = (config.kind, config.modules, config.fixed_step_map) == ("prism", init.num_modules, init.step_map)
        if others or not same or config.measures_step_map:
            raise PrismError(
                f"the initial drafter has {init.num_modules} modules, so it can only be tuned as it is: pass "
                f"--kind prism --one-step-updates 0 --alignment-updates 0 --modules {init.num_modules} --step-map "
                f"{','.join(map(str, init.step_map))}, or a drafter with one module"
            )
    is_lm = config.kind == "standard"
    if (init.kind == "standard") != is_lm or (not is_lm and init.features != config.features):
        raise PrismError(
            f"the initial drafter is of kind {init.kind} with features {init.features}: pass the same --kind and "
            "--features, or another --init"
        )


def _with_shape(config: TrainConfig, init: DrafterConfig, target: Target) -> TrainConfig:
    """`config` with the options that `init` has decided."""
    if (init.kind == "standard") != (config.kind == "standard"):
        return config  # which `check_init` refuses
    new, taken = new_shape(target, config), {}
    for option, field in _FIELDS.items():
        wanted, own = getattr(new, field), getattr(init, field)
        if wanted == own:
            continue
        if option not in config.model_fields_set:
            taken[option] = 0 if own is None else own
        elif option != "kv_mode":
            raise PrismError(
                f"--{option.replace('_', '-')} {getattr(config, option)} is not what the initial drafter has, which is "
                f"{0 if own is None else own}: leave the option out, or pass another --init"
            )
    config = parse(TrainConfig, config.model_dump() | taken, "with the initial drafter")
    if init.feature_layers not in ((), multi_layers(target.config.num_layers)):
        raise PrismError(
            f"the initial drafter fuses the hidden states {list(init.feature_layers)}, but training computes "
            f"{list(multi_layers(target.config.num_layers))}: pass another --init"
        )
    return config
