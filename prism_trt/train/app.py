"""The `train` command line. Every field of its configs is one option."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import torch
import typer
from pydantic.fields import FieldInfo

from prism_trt.config import GenerationConfig, StrictModel, TrainConfig, parse
from prism_trt.data.prompts import PromptConfig
from prism_trt.errors import PrismError
from prism_trt.train.run import RunOptions, RunPaths, run_training
from prism_trt.train.world import WorldConfig, open_world


def app() -> typer.Typer:
    """The typer app of ``python -m prism_trt.train``."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(_train_command())
    return command


def train(
    context: typer.Context,
    target: Annotated[Path, typer.Option(help="target: Hugging Face directory or GGUF file")],
    data: Annotated[
        Path | None, typer.Option(help="prompts, one JSON object per line; may be left out with a complete --cache")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="drafter directory to write")] = None,
    work: Annotated[
        Path | None, typer.Option(help="directory of checkpoints and TensorBoard logs  [default: OUT.work]")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="directory of the target's answers, reused when complete  [default: WORK/cache]"),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="drafter whose weights training starts from; several modules are only tuned")
    ] = None,
    generate_only: Annotated[bool, typer.Option("--generate-only", help="stop when the answers are generated")] = False,
    answers: Annotated[int | None, typer.Option(min=1, help="prompts to answer  [default: all]")] = None,
    slots: Annotated[int, typer.Option(min=1, help="answers generated at once")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads  [default: all cores]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    parallel: Annotated[str, typer.Option(help="ddp or fsdp, when torchrun starts several processes")] = "ddp",
    wandb: Annotated[str | None, typer.Option(help="also log to this Weights & Biases project")] = None,
    online: Annotated[
        bool,
        typer.Option("--online", help="compute features while training; the cache keeps tokens only"),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what the run needs, and stop")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing --out")] = False,
    **options: Any,
) -> None:
    """Train a drafter for a target: answer the prompts with it, then train on its hidden states.

    Interrupt at any time; the same command continues. torchrun -m prism_trt.train runs it on several devices.
    """
    if out is None and not generate_only:
        raise PrismError("--out is missing: name the drafter directory to write, or pass --generate-only")
    if generate_only and data is None:
        raise PrismError("--generate-only needs --data: name the file of prompts")
    if work is None and out is not None:
        work = out.with_name(out.name + ".work")
    if cache is None and work is not None:
        cache = work / "cache"
    if cache is None:
        raise PrismError("--cache is missing: name the directory the answers go to")
    if threads is not None:
        torch.set_num_threads(threads)
    given = {name: value for name, value in options.items() if _is_given(context, name)}
    training = _config(TrainConfig, given)
    with open_world(parse(WorldConfig, {"device": device, "parallel": parallel}, "command line")) as world:
        run_training(
            RunPaths(target, data, None if generate_only else out, work or cache, cache, init),
            _config(PromptConfig, given),
            _config(GenerationConfig, given),
            training,
            RunOptions(slots, answers, overwrite, wandb, dry_run, online),
            world,
            _command_line(sys.argv),
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _config(model: type[Any], given: dict[str, Any]) -> Any:
    """A config of the options that are given, so that it can tell them from defaults."""
    return parse(model, {name: given[name] for name in model.model_fields if name in given}, "command line")


def _command_line(arguments: list[str]) -> list[str]:
    """A command line to repeat, of a process started as ``prism-trt train`` or ``python -m prism_trt.train``."""
    options = arguments[1:]
    return ["prism-trt", "train", *(options[1:] if options[:1] == ["train"] else options)]


def _train_command() -> Any:
    """`train` with ``**options`` spelled out as one parameter per config field, which is what typer reads."""

    def command(**arguments: Any) -> None:
        train(**arguments)

    own = [p for p in inspect.signature(train, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = own + _options(PromptConfig) + _options(GenerationConfig) + _options(TrainConfig)
    command.__doc__ = train.__doc__
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _options(model: type[StrictModel]) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[_option_type(field), typer.Option(help=field.description)],
        )
        for name, field in model.model_fields.items()
    ]


def _option_type(field: FieldInfo) -> Any:
    """The type typer parses; a choice of strings stays a string, which pydantic checks."""
    choice = get_origin(field.annotation) is Literal and get_args(field.annotation)
    return str if choice else field.annotation
