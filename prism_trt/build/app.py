"""Command line of `prism_trt.build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_trt.config import TreeShape
from prism_trt.errors import PrismError


def app() -> typer.Typer:
    """The `build` command."""
    command = typer.Typer(add_completion=False, help="Build an engine for one kind of machine.")

    @command.command()
    def build(
        out: Annotated[Path, typer.Option(help="engine directory to write")],
        target: Annotated[Path | None, typer.Option(help="target: HF directory or GGUF file")] = None,
        bundle: Annotated[Path | None, typer.Option(help="finish this bundle, on the GPU it is for")] = None,
        drafter: Annotated[Path | None, typer.Option(help="drafter checkpoint; without it only plain decoding")] = None,
        gpu: Annotated[str, typer.Option(help="profile: cpu, cuda, a100, rtx4090 or h800")] = "cpu",
        runtime: Annotated[
            str | None, typer.Option(help="tensorrt-rtx or tensorrt for a GPU; the profile's by default")
        ] = None,
        tree: Annotated[str | None, typer.Option(help="default draft tree, SIZE/WIDTH/DEPTH")] = None,
        context: Annotated[int | None, typer.Option(min=16, help="K/V entries per request")] = None,
        slots: Annotated[int | None, typer.Option(min=1, help="concurrent requests")] = None,
        dtype: Annotated[str | None, typer.Option(help="of the computation; the profile's first by default")] = None,
        fp8: Annotated[bool, typer.Option("--fp8", help="store weights and activations in FP8")] = False,
        int8: Annotated[bool, typer.Option("--int8", help="store the target's weights in INT8")] = False,
        calibration: Annotated[Path | None, typer.Option(help="prompts for --fp8 and --int8, as for training")] = None,
        overwrite: Annotated[bool, typer.Option(help="replace an existing engine")] = False,
    ) -> None:
        """Build an engine directory with a checked manifest."""
        from prism_trt.build.builder import build_engine, finish_bundle
        from prism_trt.build.bundle import BundleManifest

        if bundle is not None:
            finish_bundle(bundle, out, overwrite)
            typer.echo(f"{out}: compiled from {bundle}")
            return
        if target is None:
            raise PrismError("--target is missing: name the model to build an engine for, or a --bundle to finish")
        if fp8 and int8:
            raise PrismError("--fp8 and --int8 exclude each other: pass one of them")
        shape = TreeShape.parse(tree) if tree is not None else None
        manifest = build_engine(
            profile=gpu,
            runtime=runtime,
            target=target,
            drafter=drafter,
            out=out,
            tree=shape,
            context=context,
            slots=slots,
            dtype=dtype,
            quantization="fp8" if fp8 else "int8" if int8 else None,
            calibration=calibration,
            overwrite=overwrite,
            say=typer.echo,
        )
        if isinstance(manifest, BundleManifest):
            errors = ", ".join(f"{name} {error:.2%}" for name, error in manifest.deviation.items())
            typer.echo(
                f"{out}: bundle for {gpu}, its networks checked on this processor (deviation from float32: {errors}); "
                f"copy it to a host with that GPU and run: python -m prism_trt.build --bundle {out.name} --out engine"
            )
            return
        latency = "" if manifest.latency_ms is None else f"; one token takes {manifest.latency_ms.forward[1][1]:.1f} ms"
        typer.echo(
            f"{out}: {manifest.runtime} engine ({manifest.isa or manifest.dtype}), context {manifest.limits.context}, "
            f"{manifest.limits.slots} slots, tree {manifest.default_tree}{latency}"
        )

    return command
