"""The kernels compile for every GPU without one, and within limits that keep enough of them resident."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import triton

from plugins import pool_attention as pool
from plugins import step_linear as linear
from plugins.compilation import MAX_SHARED_BYTES, CompiledKernel
from prism_trt.errors import PrismError

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
CAPABILITIES = (80, 89, 90)
MAX_SPILLED_BYTES = 16  # the assembler may give up a register or two per thread for one more resident block
WEIGHTS = (2, 6144, 4096)  # the projections to queries, keys and values of LLaMA-3-8B


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def registers(kernel: CompiledKernel, compute_capability: int, directory: Path) -> int:
    """Registers per thread, by NVIDIA's assembler, having checked that hardly any is spilled."""
    source = directory / "kernel.ptx"
    source.write_text(kernel.ptx)
    target = re.search(r"\.target (sm_\w+)", kernel.ptx)
    assert target is not None and target[1].startswith(f"sm_{compute_capability}")
    command = [PTXAS, "-v", "-arch", target[1], source, "-o", directory / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert used is not None and spilled is not None
    assert max(map(int, spilled.groups())) <= MAX_SPILLED_BYTES
    return int(used[1])


@pytest.mark.parametrize("number", linear.TACTICS)
def test_step_linear(number: int, tmp_path: Path) -> None:
    tactic = linear.TACTICS[number]
    compute_capability = CAPABILITIES[number % 3]
    weight_type = "fp8e4nv" if number % 2 and compute_capability > 80 else "fp16"
    kernel = linear.compile_step_linear("fp16", weight_type, WEIGHTS, True, True, tactic, compute_capability, tmp_path)
    used = registers(kernel, compute_capability, tmp_path)
    assert kernel.threads == 32 * tactic.num_warps
    assert kernel.shared_bytes <= MAX_SHARED_BYTES
    # Three blocks of one to sixteen tokens fit a multiprocessor's 65,536 registers, and two of any other.
    assert used * kernel.threads * (3 if tactic.tokens == 16 else 2) <= 65536
    assert kernel.ptx.count("cp.async") > 0, "weights are not prefetched"


@pytest.mark.parametrize("number", pool.TACTICS)
def test_pool_attention(number: int, tmp_path: Path) -> None:
    tactic = pool.TACTICS[number]
    compute_capability = CAPABILITIES[number % 3]
    kernel = pool.compile_pool_attention("bf16", 32, 8, 128, 2048, tactic, compute_capability, tmp_path)
    used = registers(kernel, compute_capability, tmp_path)
    assert kernel.threads == 32 * tactic.num_warps
    assert used * kernel.threads <= 65536


def test_fp8_is_refused_for_sm_80(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=r"^FP8 weights need a GPU of compute capability 8\.9 .* build with fp16 or"):
        linear.compile_step_linear("fp16", "fp8e4nv", WEIGHTS, True, False, linear.TACTICS[1], 80, tmp_path)


def test_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("fp16", "fp16", (2, 64, 64), False, False, linear.TACTICS[1], 90, tmp_path)
    kernel = linear.compile_step_linear(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(triton, "compile", lambda *_, **__: pytest.fail("compiled again"))
        assert linear.compile_step_linear(*arguments) == kernel
    (file,) = tmp_path.glob("*.ptx")
    subprocess.run([PTXAS, "-arch", "sm_90a", file, "-o", tmp_path / "kernel.cubin"], check=True)
    file.write_text("// launch: {}")
    with pytest.raises(PrismError, match=r"\.ptx is damaged"):
        linear.compile_step_linear(*arguments)
