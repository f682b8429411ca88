"""Time contestants on the same prompts, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prism_trt.bench.bandwidth import BandwidthProbe
from prism_trt.bench.peers.timing import Peer, Timing

_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class PeerRun:
    """Raw outcome of `run_peers`."""

    timings: list[list[Timing]]
    """[contestant][prompt]."""
    bandwidth: list[float]
    """GB/s, one per prompt."""


def run_peers(
    peers: Sequence[Peer], prompts: Sequence[list[int]], tokens: int, on_answer: Callable[[], None] = lambda: None
) -> PeerRun:
    """Answer every prompt with every contestant; the order of contestants rotates from prompt to prompt."""
    probe = BandwidthProbe()
    for peer in peers:
        peer.decode(prompts[0], _WARM_UP_TOKENS)
    run = PeerRun([[] for _ in peers], [])
    for index, prompt in enumerate(prompts):
        run.bandwidth.append(probe.measure())
        for place in range(len(peers)):
            which = (place + index) % len(peers)
            run.timings[which].append(peers[which].decode(prompt, tokens))
            on_answer()
    return run
