"""Run the kernels in Triton's interpreter, on the processor.

This is a program of its own, because the interpreter is chosen when Triton is imported.
``python -m tests.plugins.interpreted <file>`` writes the outputs of all cases to the file. With ``guarded`` after the
file, one of three modules lies in memory that may not be touched and no token uses it; with ``trapped``, all do.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from plugins.pool_attention import pool_attention
from plugins.step_linear import TACTICS, step_linear
from tests.plugins.cases import attention_cases, linear_cases


def widen_bfloat16_dots() -> None:
    """The interpreter holds bfloat16 as integers and multiplies those: give its products the float32 values instead."""
    builder = interpreter.InterpreterBuilder
    plain = builder.create_dot

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(operand, tl.float32) for operand in (a, b))
        return plain(self, a, b, *rest)

    builder.create_dot = create_dot


def run_cases() -> dict[str, dict[str, torch.Tensor]]:
    """Outputs of every case by its name."""
    outputs = {case.name: {"y": step_linear(**case.arguments())} for case in linear_cases()}
    for case in attention_cases():
        arguments = case.arguments()
        y = pool_attention(**arguments)
        outputs[case.name] = {"y": y, "k_pool": arguments["k_pool"], "v_pool": arguments["v_pool"]}
    return outputs


def run_guarded(module: int) -> torch.Tensor:
    """`step_linear` with all tokens on `module` of three; touching the memory of module 1 ends the process."""
    outputs, inputs = 16, 256
    module_bytes = 2 * outputs * inputs
    assert module_bytes % mmap.PAGESIZE == 0
    memory = mmap.mmap(-1, 3 * module_bytes)
    weights = np.frombuffer(memory, np.float16)
    weights[:] = 1
    address = weights.ctypes.data + module_bytes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(module_bytes), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    stacked = torch.from_numpy(weights.reshape(3, outputs, inputs))
    of_token = torch.full((3,), module, dtype=torch.int32)
    return step_linear(torch.ones(3, inputs, dtype=torch.float16), stacked, of_token, tactic=TACTICS[1])


if __name__ == "__main__":
    widen_bfloat16_dots()
    path, mode = sys.argv[1], sys.argv[2:]
    torch.save(run_guarded(1 if mode == ["trapped"] else 2) if mode else run_cases(), path)
