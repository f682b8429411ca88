"""Command line of the comparison with peers."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console

from prism_trt.bench.methods import engine_info
from prism_trt.bench.peers.engine_peer import EnginePeer
from prism_trt.bench.peers.gguf_writer import write_gguf
from prism_trt.bench.peers.llama_peer import LlamaPeer
from prism_trt.bench.peers.report import console_table, markdown
from prism_trt.bench.peers.results import PeersResult, compare
from prism_trt.bench.peers.runner import run_peers
from prism_trt.bench.peers.timing import Peer, pass_shapes
from prism_trt.bench.peers.transformers_peer import TransformersPeer
from prism_trt.bench.prompts import PROMPTS
from prism_trt.bench.questions import load_questions
from prism_trt.bench.results import write_json
from prism_trt.bench.runner import environment, summarise_bandwidth
from prism_trt.engines.loading import load_engine, load_engine_tokenizer
from prism_trt.engines.protocol import Engine
from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_file
from prism_trt.progress import progress
from prism_trt.target.loading import load_target, save_hf
from prism_trt.target.tokenizer import Tokenizer


def app() -> typer.Typer:
    """The `bench.peers` command."""
    command = typer.Typer(add_completion=False, help="Compare an engine with transformers and llama.cpp.")
    command.command()(peers)
    return command


def peers(
    engine: Annotated[Path, typer.Option(help="Engine directory, as written by the build command.")],
    target: Annotated[Path, typer.Option(help="The engine's target: Hugging Face directory or GGUF file.")],
    json_path: Annotated[Path, typer.Option("--json", help="Where the result is written.")],
    llama_python: Annotated[
        Path | None, typer.Option(help="Interpreter with llama_cpp; without it llama.cpp is left out.")
    ] = None,
    gguf: Annotated[
        list[Path] | None, typer.Option(help="Further GGUF file for llama.cpp, run as it is; may be repeated.")
    ] = None,
    questions: Annotated[
        list[Path] | None, typer.Option(help="question.jsonl file whose first turns are the prompts.")
    ] = None,
    per_set: Annotated[int, typer.Option(min=1, help="Questions taken of each file.")] = 10,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded per prompt.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every contestant.")] = 2,
    markdown_path: Annotated[Path | None, typer.Option("--markdown", help="Where a table is written.")] = None,
) -> None:
    """Decode the same prompts with every contestant, interleaved; the engine's plain decoding is the base."""
    if gguf and llama_python is None:
        raise PrismError("--gguf needs llama.cpp: pass --llama-python the interpreter that has llama_cpp")
    loaded = load_engine(engine, threads=threads)
    torch.set_num_threads(threads)  # for transformers
    prompts = _prompts(load_engine_tokenizer(engine), questions or [], per_set, loaded, tokens)
    passes = pass_shapes(loaded.limits.context)
    context = max(max(map(len, prompts)) + tokens, max(shape.context + shape.tokens for shape in passes))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with progress("Loading the peers", total=None):
            contestants = _contestants(stack, scratch, loaded, target, llama_python, gguf or [], threads, context)
        with progress("Decoding", total=len(contestants) * len(prompts)) as bar:
            run = run_peers(contestants, prompts, tokens, passes, lambda: bar.advance(1))
    pass_ms = [
        {str(shape): 1e3 * median(seconds) for shape, seconds in zip(passes, measured, strict=True)}
        for measured in run.pass_seconds
    ]
    result = PeersResult(
        engine=engine_info(engine, threads),
        environment=environment(),
        bandwidth_gb_s=summarise_bandwidth(run.bandwidth),
        prompts=len(prompts),
        tokens=tokens,
        peers=compare(
            [peer.name for peer in contestants], [peer.version for peer in contestants], run.timings, pass_ms
        ),
    )
    write_json(result, json_path)
    if markdown_path is not None:
        with atomic_file(markdown_path) as temporary:
            temporary.write_text(markdown(result), encoding="utf-8")
    Console().print(console_table(result))


def _prompts(tokenizer: Tokenizer, paths: list[Path], per_set: int, engine: Engine, tokens: int) -> list[list[int]]:
    texts = [question.turns[0] for question in load_questions(paths, per_set)] if paths else list(PROMPTS)
    encoded = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    room = engine.limits.context - tokens
    fitting = [prompt for prompt in encoded if len(prompt) <= room]
    if not fitting:
        raise PrismError(f"no prompt fits the engine's context of {engine.limits.context} tokens: lower --tokens")
    return fitting


def _contestants(
    stack: ExitStack,
    scratch: Path,
    engine: Engine,
    target_path: Path,
    llama_python: Path | None,
    ggufs: list[Path],
    threads: int,
    context: int,
) -> list[Peer]:
    contestants: list[Peer] = [EnginePeer("prism_trt vanilla", engine, None)]
    if engine.has_drafter:
        tree = engine.default_tree
        contestants.append(EnginePeer(f"prism_trt tree {tree}", engine, tree))
    target = load_target(target_path)
    directory = scratch / "hf"
    save_hf(target, directory)
    contestants.append(TransformersPeer("transformers bf16", directory, torch.bfloat16))
    contestants.append(TransformersPeer("transformers fp32", directory, torch.float32))
    if llama_python is not None:
        written = scratch / "bf16.gguf"
        write_gguf(target, written)
        for name, path in [("BF16", written), *((path.stem, path) for path in ggufs)]:
            for flash in (False, True):
                label = f"llama.cpp {name}{' flash-attn' if flash else ''}"
                peer = LlamaPeer(label, llama_python, path, threads, context, flash)
                contestants.append(stack.enter_context(peer))
    return contestants
