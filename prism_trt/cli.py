"""The `prism-trt` command and what all command lines share.

Each subcommand lives in its own module, which is imported only when that subcommand is run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import typer

from prism_trt.errors import PrismError
from prism_trt.interrupts import interrupts_outside_imports

_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


@dataclass(frozen=True)
class Command:
    """A subcommand: the module whose `app()` builds its typer app, and one line of help."""

    module: str
    help: str


COMMANDS = {
    "train": Command("prism_trt.train.app", "Train a drafter for a target."),
    "build": Command("prism_trt.build.app", "Build an engine from a target and a drafter."),
    "deploy": Command("prism_trt.deploy.app", "Write a Triton model repository and serve it."),
    "frontend": Command("prism_trt.frontend.app", "Offer a server through OpenAI's API."),
    "client": Command("prism_trt.client.app", "Send prompts to a server and stream the answers."),
    "bench": Command("prism_trt.bench.app", "Measure an engine's acceptance length and speed-up."),
    "inspect": Command("prism_trt.inspect.app", "Say what a file or directory is and whether it is sound."),
    "drafter": Command("prism_trt.drafter.app", "Exchange drafters with EAGLE, HASS and the PRISM artifact."),
    "trtllm": Command("prism_trt.trtllm.app", "Write target and drafter as a TensorRT-LLM checkpoint."),
    "quickstart": Command("prism_trt.quickstart.app", "Train, build, serve and measure on this machine."),
}


def run(app: typer.Typer, arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    """Run a command line and exit.

    A `PrismError` or a missing third-party package ends it with one sentence on stderr and exit code 2; an interruption
    ends it with exit code 130.

    Args:
        app: what to run.
        arguments: its arguments; None: those of the process.
        name: how usage messages call it; None: how it was started.
    """
    try:
        with interrupts_outside_imports():
            app(args=arguments, prog_name=name)
    except PrismError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __package__:
            raise
        _fail(f"this needs the package {error.name}: install everything with pip install 'prism-trt[quickstart]'")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def load(name: str) -> typer.Typer:
    """The typer app of subcommand `name`."""
    app: typer.Typer = importlib.import_module(COMMANDS[name].module).app()
    return app


def app() -> typer.Typer:
    """The `prism-trt` command."""
    root = typer.Typer(help="Train, compile and serve PRISM draft models.", no_args_is_help=True, add_completion=False)
    for name, command in COMMANDS.items():
        root.command(name, help=command.help, add_help_option=False, context_settings=_PASS_THROUGH)(_forward)
    return root


def _forward(context: typer.Context) -> None:
    name = str(context.info_name)
    run(load(name), context.args, f"prism-trt {name}")


def main() -> None:
    """Entry point of the `prism-trt` script."""
    run(app())
