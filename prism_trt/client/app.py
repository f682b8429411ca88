"""Command line of `prism_trt.client`."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Annotated

import typer


def app() -> typer.Typer:
    """The `client` command."""
    command = typer.Typer(add_completion=False, help="Ask a server and print its answer.")

    @command.command()
    def client(
        prompt: Annotated[str, typer.Argument(help="What to ask.")],
        url: Annotated[str, typer.Option(help="HOST:PORT of the server's gRPC endpoint.")] = "127.0.0.1:8001",
        model: Annotated[str, typer.Option(help="Name of the served model.")] = "prism",
        stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is made.")] = False,
        max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
        temperature: Annotated[float | None, typer.Option(help="0 is greedy.  [default: 0]")] = None,
        top_k: Annotated[int | None, typer.Option(help="Sample from the k most probable tokens.")] = None,
        top_p: Annotated[float | None, typer.Option(help="Sample from the most probable tokens of this mass.")] = None,
        seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Makes sampling repeatable.")] = None,
        stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
        no_chat: Annotated[bool, typer.Option("--no-chat", help="Continue the prompt; no chat template.")] = False,
        timeout: Annotated[float, typer.Option(min=0.1, help="Longest silence of the server, in seconds.")] = 120.0,
        stats: Annotated[bool, typer.Option("--stats", help="Print speed and acceptance to stderr.")] = False,
    ) -> None:
        """Send a prompt to a server started with `python -m prism_trt.deploy --run` and print the answer."""
        from prism_trt.client.generate import Options, Statistics, stream_generate

        options = Options(
            model=model,
            max_tokens=max_tokens,
            stream=stream,
            chat=not no_chat,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=tuple(stop or ()),
            timeout=timeout,
        )
        start = time.perf_counter()
        first = 0.0
        end: Statistics | None = None
        # Closing cancels the request at once, also when Ctrl-C falls between two pieces.
        with closing(stream_generate(url, prompt, options)) as chunks:
            for chunk in chunks:
                first = first or time.perf_counter() - start
                typer.echo(chunk.text, nl=False)
                end = chunk.statistics
        typer.echo()
        if stats and end is not None:
            seconds = time.perf_counter() - start
            typer.echo(
                f"{end.num_input_tokens} tokens in, {end.num_output_tokens} out ({end.finish_reason}) in "
                f"{seconds:.2f} s, first text after {1000 * first:.0f} ms, "
                f"{end.num_output_tokens / seconds:.1f} tokens/s, {end.acceptance_length:.2f} tokens per target pass",
                err=True,
            )

    return command
