"""From an emitted network to a serialized plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from prism_trt.convert.graph import Emitted, has_plugins, logger_of
from prism_trt.engines.tensorrt.binding import NetworkLimits
from prism_trt.engines.tensorrt.names import CALL_TOKENS, IN_FLIGHT, LIVE, PICKED_TOKENS, ROWS
from prism_trt.errors import PrismError
from prism_trt.manifest import atomic_file
from prism_trt.progress import Reporter


class Extent(NamedTuple):
    """Sizes of a dynamic dimension: the least, the one to optimise for, the greatest."""

    least: int
    usual: int
    most: int


Profile = Mapping[str, Extent]
"""Extents of a network's dynamic dimensions by their names."""


def serving_profile(limits: NetworkLimits) -> Profile:
    """Everything that calls within `limits` can ask for; most calls are one row's tree.

    One profile for short and long calls alike, because a plan with two stores part of the weights twice.
    """
    tree = Extent(1, limits.shared_tokens, limits.engine.tokens_per_call)
    return {
        ROWS: Extent(1, 1, limits.slots),
        CALL_TOKENS: tree,
        PICKED_TOKENS: tree,
        LIVE: Extent(1, max(1, limits.context // 4), limits.context),
        IN_FLIGHT: Extent(1, limits.shared_tokens, limits.context),
    }


def compile_network(
    emitted: Emitted,
    profile: Profile,
    plan: Path,
    capability: str | None = None,
    progress: Reporter | None = None,
) -> str:
    """Build `emitted` and write its plan to the file `plan`; a failed build leaves no file.

    Args:
        emitted: from `prism_trt.convert`.
        profile: extents of every dynamic dimension of the network.
        plan: the file to write; the plan is streamed to it, so that it is never in memory as a whole.
        capability: a `ComputeCapability` such as ``SM89``, for which TensorRT-RTX builds without a GPU; None builds for
            the GPU that is present.
        progress: is told the phases of the build.

    Returns:
        The builder's dump of the fused layers, which `prism_trt.convert.layers` reads; empty when none was logged.

    Raises:
        PrismError: TensorRT refused the network, or does not know `capability`.
    """
    trt = emitted.trt
    _, log = logger_of(trt)
    config = emitted.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the layers' names are left out of the plan
    if capability is not None:
        known = getattr(trt, "ComputeCapability", None)
        if not hasattr(known, capability):
            raise PrismError(f"{trt.__name__} cannot build for {capability}: choose a GPU that it supports")
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(known, capability), 0)
    if emitted.plugins:
        if not has_plugins(trt):
            raise PrismError(f"{trt.__name__} has no plugins: emit the network without them")
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)  # K/V is updated in place
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # what TensorRT-RTX can capture in CUDA graphs
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.add_optimization_profile(_optimization_profile(emitted, profile))
    monitor = None if progress is None else _monitor(trt, progress, f"compiling {plan.stem}")
    if monitor is not None:
        config.progress_monitor = monitor
    log.start()
    with atomic_file(plan) as temporary:
        with temporary.open("wb") as file:
            done = emitted.builder.build_serialized_network_to_stream(emitted.network, config, _writer(trt, file))
        log.check("to build the network")
        if not done or not temporary.stat().st_size:
            raise PrismError("TensorRT built nothing and gave no reason: build again with another version of it")
    return log.layer_dump or ""


def _optimization_profile(emitted: Emitted, extents: Profile) -> Any:
    profile = emitted.builder.create_optimization_profile()
    for number in range(emitted.network.num_inputs):
        value = emitted.network.get_input(number)
        least, usual, most = zip(*map(_extent_of(value, extents), range(len(value.shape))), strict=True)
        profile.set_shape(value.name, least, usual, most)
    return profile


def _extent_of(value: Any, extents: Profile) -> Any:
    def extent(axis: int) -> Extent:
        size = value.shape[axis]
        return extents[value.get_dimension_name(axis)] if size < 0 else Extent(size, size, size)

    return extent


def _writer(trt: Any, file: IO[bytes]) -> Any:
    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return Writer()


def _monitor(trt: Any, progress: Reporter, action: str) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            progress.describe(f"{action}: {name}")

        def step_complete(self, name: str, step: int) -> bool:
            progress.advance()
            return True  # go on

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()
