"""Markdown and console tables of a comparison with peers."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from prism_trt.bench.peers.results import PeersResult

HEADER = ("contestant", "version", "median tok/s", "pooled tok/s", "ratio [95 % CI]", "same output")


def header(result: PeersResult) -> tuple[str, ...]:
    """`HEADER` and a column for each pass."""
    return *HEADER, *(f"pass over {shape}, ms" for shape in result.peers[0].pass_ms)


def rows(result: PeersResult) -> list[tuple[str, ...]]:
    """One row of `header` per contestant."""
    return [
        (
            peer.name,
            peer.version,
            f"{peer.median_tps:.1f}",
            f"{peer.pooled_tps:.1f}",
            f"{peer.ratio:.2f} [{peer.ratio_interval.low:.2f}, {peer.ratio_interval.high:.2f}]",
            f"{peer.same_output:.0%}",
            *(f"{value:.1f}" for value in peer.pass_ms.values()),
        )
        for peer in result.peers
    ]


def markdown(result: PeersResult) -> str:
    """The result as one Markdown table with the settings that produced it."""
    band = result.bandwidth_gb_s
    lines = [
        f"{result.prompts} prompts, {result.tokens} tokens each, batch 1, {result.engine.threads} threads, greedy, "
        f"interleaved; tokens per second without prefill. Ratio: {result.peers[0].name} over the contestant. A pass "
        "over tokens after none is a prefill, one over several after others a verification; medians. Machine: "
        f"{result.environment.processor}, memory bandwidth during the run {band.median:.0f} GB/s (from {band.low:.0f} "
        f"to {band.high:.0f}).",
        "",
        "| " + " | ".join(header(result)) + " |",
        "|" + " --- |" * len(header(result)),
        *("| " + " | ".join(row) + " |" for row in rows(result)),
    ]
    return "\n".join(lines) + "\n"


def console_table(result: PeersResult) -> Table:
    """The columns that fit a terminal."""
    table = Table(title=f"Decode speed at batch 1 (ratio: {result.peers[0].name} over the contestant)", box=SIMPLE_HEAD)
    table.add_column(HEADER[0], overflow="fold")
    for name in header(result)[2:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows(result):
        table.add_row(row[0], *row[2:])
    return table
