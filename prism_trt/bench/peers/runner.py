"""Time contestants on the same prompts, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prism_trt.bench.bandwidth import BandwidthProbe
from prism_trt.bench.peers.timing import PassShape, Peer, Timing

_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class PeerRun:
    """Raw outcome of `run_peers`."""

    timings: list[list[Timing]]
    """[contestant][prompt]."""
    bandwidth: list[float]
    """GB/s, one per prompt."""
    pass_seconds: list[list[list[float]]]
    """[contestant][pass shape][prompt]."""


def run_peers(
    peers: Sequence[Peer],
    prompts: Sequence[list[int]],
    tokens: int,
    passes: Sequence[PassShape] = (),
    on_answer: Callable[[], None] = lambda: None,
) -> PeerRun:
    """Answer every prompt with every contestant, and time `passes` once per prompt.

    The order of contestants rotates from prompt to prompt.
    """
    probe = BandwidthProbe()
    for peer in peers:
        peer.decode(prompts[0], _WARM_UP_TOKENS)
    run = PeerRun([[] for _ in peers], [], [[[] for _ in passes] for _ in peers])
    text = [token for prompt in prompts for token in prompt]
    for index, prompt in enumerate(prompts):
        run.bandwidth.append(probe.measure())
        for place in range(len(peers)):
            which = (place + index) % len(peers)
            run.timings[which].append(peers[which].decode(prompt, tokens))
            for number, shape in enumerate(passes):
                count = shape.context + shape.tokens
                read = (text * (1 + count // len(text)))[:count]
                run.pass_seconds[which][number].append(peers[which].time_pass(read, shape.context))
            on_answer()
    return run
