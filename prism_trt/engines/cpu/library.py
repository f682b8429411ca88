"""Compile the C++ engine and call it through ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_trt.errors import PrismError

SOURCES = Path(__file__).parent / "csrc"


@dataclass(frozen=True)
class Isa:
    """An instruction set the kernels have a variant for."""

    name: str
    cpu_flags: frozenset[str]
    """What /proc/cpuinfo must list."""
    compiler_flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_AVX512_CPU = frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"})
ISAS = (
    Isa("avx512-bf16", _AVX512_CPU | {"avx512_bf16"}, (*_AVX512, "-mavx512bf16")),
    Isa("avx512", _AVX512_CPU, _AVX512),
    Isa("avx2", frozenset({"avx2", "fma", "f16c"}), _AVX2),
    Isa("generic", frozenset(), ()),
)
"""Best first; the last one runs anywhere."""


def cpu_flags() -> frozenset[str]:
    """The features this machine's processor reports; empty where /proc/cpuinfo does not exist."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def best_isa(flags: frozenset[str]) -> Isa:
    """The best variant a processor with `flags` can run."""
    return next(isa for isa in ISAS if isa.cpu_flags <= flags)


def find_compiler() -> str | None:
    """Path of a C++ compiler: $CXX, g++ or c++ (GCC vector extensions are needed); None when there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def compile_library(out: Path, isa: Isa, compiler: str) -> None:
    """Compile the engine's sources into the shared library `out`.

    Raises:
        PrismError: the compiler failed; the message carries its first error line.
    """
    command = [compiler, "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno"]
    # Absolute, because the compiler runs elsewhere: what it leaves when it is interrupted goes with that directory.
    command += [*isa.compiler_flags, str(SOURCES / "engine.cpp"), "-o", str(out.absolute())]
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    if done.returncode != 0:
        errors = (
            [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no output"]
        )
        raise PrismError(f"{compiler} could not compile the cpu engine ({errors[0].strip()}): install GCC 9 or newer")


class Dims(Structure):
    """Sizes of an engine; field by field the C++ struct of the same name."""

    _fields_ = [
        *((name, c_int32) for name in ("vocab", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim")),
        *((name, c_int32) for name in ("qkv_bias", "modules", "draft_hidden", "draft_layers", "draft_vocab")),
        *((name, c_int32) for name in ("draft_intermediate", "draft_heads", "draft_kv_heads", "draft_head_dim")),
        *((name, c_int32) for name in ("draft_bias", "draft_fusion", "draft_feature_norm", "draft_is_lm")),
        *((name, c_int32) for name in ("context", "slots", "tokens", "threads")),
        ("rms_eps", c_float),
        ("draft_rms_eps", c_float),
    ]


_BATCH: list[Any] = [c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p]


class Library:
    """The C functions of one engine. Calls release the interpreter lock while they compute."""

    def __init__(
        self,
        path: Path,
        dims: Dims,
        step_map: Sequence[int],
        feature_layers: Sequence[int],
        draft_vocab: Sequence[int],
        weights: Path,
    ) -> None:
        """Load `path` and the packed `weights`.

        Raises:
            PrismError: the library cannot be loaded or rejects the weights.
        """
        self._engine = None
        try:
            self._lib = ctypes.CDLL(str(path))
            self._declare()
        except (OSError, AttributeError) as error:  # AttributeError: a library of another version lacks a function
            raise PrismError(f"cannot load {path} ({error}): build the engine again on this machine") from None
        self._engine = self._lib.prism_open(
            ctypes.byref(dims),
            (c_int32 * len(step_map))(*step_map),
            len(step_map),
            (c_int32 * len(feature_layers))(*feature_layers),
            len(feature_layers),
            (c_int64 * len(draft_vocab))(*draft_vocab),
            str(weights).encode(),
        )
        if not self._engine:
            raise PrismError(f"{weights}: {self._message()}: build the engine again")

    def _declare(self) -> None:
        lib = self._lib
        lib.prism_error.restype = lib.prism_isa.restype = c_char_p
        lib.prism_open.restype = c_void_p
        open_arguments: list[Any] = [
            POINTER(Dims),
            POINTER(c_int32),
            c_int,
            POINTER(c_int32),
            c_int,
            POINTER(c_int64),
            c_char_p,
        ]
        lib.prism_open.argtypes = open_arguments
        lib.prism_close.restype = None
        lib.prism_close.argtypes = [c_void_p]
        lib.prism_forward.argtypes = [*_BATCH, c_int, c_void_p, c_void_p, c_void_p]
        lib.prism_commit.argtypes = [c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int]
        lib.prism_draft.argtypes = [*_BATCH, c_int, c_void_p, c_int, c_void_p, c_void_p]
        draft = (
            c_void_p,
            c_int,
            c_void_p,
            c_void_p,
            c_void_p,
            c_int,
            c_void_p,
            c_void_p,
            c_void_p,
            c_int,
            c_int,
            c_int,
        )
        lib.prism_copy_prefix.argtypes = [c_void_p, c_int, c_int, c_int]
        lib.prism_draft_round.argtypes = [*draft, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p]
        lib.prism_speculate.argtypes = [*draft, c_float, c_void_p, c_void_p, c_void_p, c_void_p]

    def _message(self) -> str:
        return self._lib.prism_error().decode()

    @property
    def isa(self) -> str:
        """Name of the instruction set the library was compiled for."""
        return self._lib.prism_isa().decode()

    def call(self, name: str, *arguments: float | None) -> None:
        """Call a C function of the engine with numbers and data pointers.

        Raises:
            PrismError: the engine refused the call (a limit was exceeded).
        """
        if getattr(self._lib, name)(self._engine, *arguments) != 0:
            raise PrismError(f"the cpu engine refused the call: {self._message()}")

    def __del__(self) -> None:
        if self._engine:
            self._lib.prism_close(self._engine)
            self._engine = None
