"""Command line of `prism_trt.trtllm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def app() -> typer.Typer:
    """The `trtllm` command."""
    command = typer.Typer(
        add_completion=False, no_args_is_help=True, help="Write target and drafter as a TensorRT-LLM checkpoint."
    )

    @command.command("export")
    def export(
        drafter: Annotated[Path, typer.Argument(help="drafter directory")],
        target: Annotated[Path, typer.Option(help="target it was trained for: HF directory or GGUF file")],
        out: Annotated[Path, typer.Option(help="checkpoint directory to write")],
        tree: Annotated[
            str, typer.Option(help="largest draft tree, SIZE/WIDTH/DEPTH; one EagleNet for each step of its depth")
        ] = "60/10/6",
        ranks: Annotated[int, typer.Option(help="GPUs that share the model, 1 or 2")] = 1,
        dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
        overwrite: Annotated[bool, typer.Option(help="replace an existing directory")] = False,
    ) -> None:
        """Write a checkpoint for trtllm-build."""
        from prism_trt.config import TreeShape, parse
        from prism_trt.drafter.checkpoint import load_drafter
        from prism_trt.target.loading import load_target
        from prism_trt.trtllm.export import export_checkpoint
        from prism_trt.trtllm.layout import DTYPES, CheckpointOptions

        choices = {"tree": TreeShape.parse(tree), "ranks": ranks, "dtype": dtype}
        options = parse(CheckpointOptions, choices, "options")
        loaded = load_target(target, DTYPES[options.dtype])
        written = export_checkpoint(loaded, load_drafter(drafter, loaded), out, options, overwrite=overwrite)
        build = "--model_cls_file is needed" if written.needs_model_class else "no --model_cls_file is needed"
        typer.echo(
            f"{out}: {options.ranks} x {written.bytes_per_rank / 1e9:.2f} GB, {options.dtype}, "
            f"{options.tree.depth} EagleNets for a tree of {options.tree}; {build}"
        )

    @command.command("model-class")
    def model_class() -> None:
        """Print the path of the file for trtllm-build's --model_cls_file."""
        typer.echo(Path(__file__).with_name("model_class.py"))

    return command
