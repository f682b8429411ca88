"""Memory bandwidth of `step_linear` on this GPU, against a plain device copy measured in the same run.

``python scripts/bench_step_linear.py --json out.json``; needs an NVIDIA GPU. For four matrices of LLaMA-3-8B's drafter,
2 to 4 modules and 1 to 32 tokens it times every tactic, as TensorRT's builder would, and reports the fastest. Bandwidth
is the bytes the launch must move (weights of the modules in use, inputs, outputs) over its time; the goal is 90 % of
the copy's bandwidth, whose bytes are those read plus those written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prism_trt.manifest import atomic_file
from prism_trt.resources import resource

sys.path.insert(0, str(resource("plugins").parent))  # a wheel carries the plugins inside the package

from plugins.step_linear import TACTICS, step_linear, tactics_for

MATRICES = {"fc": (4096, 8192), "qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
GOAL = 0.9
WARM_UP = 5
REPEATS = 30


def median_seconds(run: Callable[[], object], flush: torch.Tensor) -> float:
    """Median device time of `run`, with the L2 cache overwritten before each call."""
    times = []
    for repeat in range(WARM_UP + REPEATS):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= WARM_UP:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth(flush: torch.Tensor) -> float:
    """Bytes per second, read plus written, of copying 512 MiB on the device."""
    source = torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), flush)


def measure(name: str, modules: int, tokens: int, used: int, fp8: bool, flush: torch.Tensor) -> dict[str, Any]:
    """The fastest tactic for tokens spread over `used` of the modules."""
    outputs, inputs = MATRICES[name]
    weights = torch.randn(modules, outputs, inputs, device="cuda", dtype=torch.float16)
    weights = weights.to(torch.float8_e4m3fn) if fp8 else weights
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.float16)
    of_token = (torch.arange(tokens, device="cuda") % used).int()
    scales = torch.ones(modules, device="cuda") if fp8 else None
    moved = used * outputs * inputs * weights.element_size() + 2 * tokens * (inputs + outputs)
    seconds, tactic = min(
        (median_seconds(partial(step_linear, x, weights, of_token, scales, tactic=TACTICS[n]), flush), n)
        for n in tactics_for(tokens)
    )
    return {
        "matrix": name,
        "weights": "fp8" if fp8 else "fp16",
        "modules": modules,
        "modules_in_use": used,
        "tokens": tokens,
        "tactic": tactic,
        "microseconds": seconds * 1e6,
        "bytes": moved,
        "bytes_per_second": moved / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--fp8", action="store_true", help="also measure FP8 weights (compute capability 8.9 or newer)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs an NVIDIA GPU, and torch sees none: run it where nvidia-smi lists one")
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    copy = copy_bandwidth(flush)
    print(f"{torch.cuda.get_device_name()}: device copy {copy / 1e9:.0f} GB/s")
    rows = []
    for name in MATRICES:
        for fp8 in (False, True) if arguments.fp8 else (False,):
            for modules in (2, 3, 4):
                for tokens in (1, 8, 16, 32):
                    for used in sorted({1, min(modules, tokens)}):
                        row = measure(name, modules, tokens, used, fp8, flush)
                        row["of_copy"] = row["bytes_per_second"] / copy
                        rows.append(row)
                        print(
                            f"{name:8} {row['weights']} M={modules} used={used} T={tokens:2} "
                            f"tactic {row['tactic']:2} {row['microseconds']:8.1f} us "
                            f"{row['bytes_per_second'] / 1e9:7.0f} GB/s {row['of_copy']:6.1%}",
                            flush=True,
                        )
    reached = sum(row["of_copy"] >= GOAL for row in rows)
    print(f"{reached} of {len(rows)} reach {GOAL:.0%} of the copy's bandwidth")
    if arguments.json is not None:
        result = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "copy_bytes_per_second": copy,
            "rows": rows,
        }
        with atomic_file(arguments.json) as path:
            path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
