"""Command line of `prism_trt.drafter`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_trt.errors import PrismError

_DTYPES = ("float16", "bfloat16", "float32")


def app() -> typer.Typer:
    """The `drafter` command."""
    command = typer.Typer(
        add_completion=False, no_args_is_help=True, help="Exchange drafters with EAGLE, HASS and the PRISM artifact."
    )

    @command.command("import")
    def import_(
        source: Annotated[Path, typer.Argument(help="directory with config.json and the weights")],
        target: Annotated[Path, typer.Option(help="target it was trained for: HF directory or GGUF file")],
        out: Annotated[Path, typer.Option(help="drafter directory to write")],
        kind: Annotated[str | None, typer.Option(help="prism, hass or eagle2  [default: by the tensors]")] = None,
        step_map: Annotated[
            str | None, typer.Option(help="module of each draft step, as 0,1,1  [default: the config's]")
        ] = None,
        feature_layers: Annotated[
            str | None,
            typer.Option(help="hidden states that are fused, as 3,17,30  [default: the PRISM artifact's]"),
        ] = None,
        overwrite: Annotated[bool, typer.Option(help="replace an existing drafter")] = False,
    ) -> None:
        """Turn an EAGLE-1/2, HASS or PRISM drafter into one that train, build and bench read."""
        from prism_trt.drafter.checkpoint import save_drafter
        from prism_trt.drafter.foreign.importing import ImportChoices, import_drafter
        from prism_trt.target.loading import load_target

        choices = ImportChoices(
            kind=kind,
            step_map=_numbers(step_map, "--step-map") if step_map else None,
            feature_layers=_numbers(feature_layers, "--feature-layers") if feature_layers else None,
        )
        imported = import_drafter(source, load_target(target), choices)
        save_drafter(imported.drafter, out, overwrite)
        for note in imported.notes:
            typer.echo(f"note: {note}", err=True)
        config = imported.drafter.config
        fed = f"hidden states {list(config.feature_layers)}" if config.feature_layers else "the last hidden state"
        typer.echo(
            f"{out}: {config.kind} drafter from {imported.layout.name} layout, M = {config.num_modules}, "
            f"step map {list(config.step_map)}, fed {fed}"
        )

    @command.command("export")
    def export(
        drafter: Annotated[Path, typer.Argument(help="drafter directory")],
        target: Annotated[Path, typer.Option(help="target it was trained for: HF directory or GGUF file")],
        out: Annotated[Path, typer.Option(help="directory to write")],
        dtype: Annotated[str, typer.Option(help=", ".join(_DTYPES))] = _DTYPES[0],
        safetensors: Annotated[
            bool, typer.Option("--safetensors", help="write model.safetensors instead of pytorch_model.bin")
        ] = False,
        overwrite: Annotated[bool, typer.Option(help="replace an existing directory")] = False,
    ) -> None:
        """Write a drafter of one module in EAGLE's layout."""
        import torch

        from prism_trt.drafter.checkpoint import load_drafter
        from prism_trt.drafter.foreign.exporting import export_eagle
        from prism_trt.target.loading import load_target

        if dtype not in _DTYPES:
            raise PrismError(f"--dtype {dtype} is none of {', '.join(_DTYPES)}")
        loaded = load_target(target)
        export_eagle(load_drafter(drafter, loaded), loaded, out, getattr(torch, dtype), safetensors, overwrite)
        typer.echo(f"{out}: EAGLE layout, {dtype}, {'model.safetensors' if safetensors else 'pytorch_model.bin'}")

    return command


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PrismError(f"{option} {text!r} is not a list of numbers, as in 0,1,1") from None
