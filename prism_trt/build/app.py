"""Command line of `prism_trt.build`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism_trt.config import TreeShape


def app() -> typer.Typer:
    """The `build` command."""
    command = typer.Typer(add_completion=False, help="Build an engine for one kind of machine.")

    @command.command()
    def build(
        target: Annotated[Path, typer.Option(help="target: HF directory or GGUF file")],
        out: Annotated[Path, typer.Option(help="engine directory to write")],
        drafter: Annotated[Path | None, typer.Option(help="drafter checkpoint; without it only plain decoding")] = None,
        gpu: Annotated[str, typer.Option(help="profile: cpu")] = "cpu",
        tree: Annotated[str | None, typer.Option(help="default draft tree, SIZE/WIDTH/DEPTH")] = None,
        context: Annotated[int | None, typer.Option(min=16, help="K/V entries per request")] = None,
        slots: Annotated[int | None, typer.Option(min=1, help="concurrent requests")] = None,
        overwrite: Annotated[bool, typer.Option(help="replace an existing engine")] = False,
    ) -> None:
        """Build an engine directory with a checked manifest."""
        from prism_trt.build.builder import build_engine

        shape = TreeShape.parse(tree) if tree is not None else None
        manifest = build_engine(
            profile=gpu,
            target=target,
            drafter=drafter,
            out=out,
            tree=shape,
            context=context,
            slots=slots,
            overwrite=overwrite,
            say=typer.echo,
        )
        latency = manifest.latency_ms.forward
        typer.echo(
            f"{out}: {manifest.runtime} engine ({manifest.isa or manifest.dtype}), context {manifest.limits.context}, "
            f"{manifest.limits.slots} slots, tree {manifest.default_tree}; one token takes {latency[1]:.1f} ms"
        )

    return command
