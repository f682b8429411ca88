"""llama.cpp in a subprocess, so that its Python packages need not be installed next to this one."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from prism_trt.bench.peers.timing import Timing
from prism_trt.errors import PrismError

WORKER = Path(__file__).with_name("llama_worker.py")


class LlamaPeer:
    """A GGUF file in llama.cpp. Use as a context manager: leaving it ends the process.

    Raises:
        PrismError: `python` cannot run, has no `llama_cpp`, or llama.cpp refuses the file.
    """

    def __init__(self, name: str, python: Path, gguf: Path, threads: int, context: int, flash_attention: bool) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        arguments = [str(python), str(WORKER), str(gguf), str(threads), str(context), str(int(flash_attention))]
        try:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
            )
        except OSError as error:
            self._log.close()
            raise PrismError(
                f"cannot run {python} for llama.cpp ({error.strerror}): pass --llama-python the interpreter that has "
                "llama_cpp"
            ) from None
        try:
            self.version = str(self._read()["version"])
        except BaseException:
            self.close()
            raise

    def decode(self, prompt: list[int], tokens: int) -> Timing:
        """Greedy decoding of exactly `tokens` tokens."""
        reply = self._ask({"prompt": prompt, "tokens": tokens})
        return Timing(reply["tokens"], reply["prefill_seconds"], reply["decode_seconds"])

    def time_pass(self, tokens: list[int], context: int) -> float:
        """See `prism_trt.bench.peers.timing.Peer.time_pass`."""
        return float(self._ask({"pass": tokens, "context": context})["seconds"])

    def close(self) -> None:
        """End the process; harmless when repeated."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> LlamaPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("ended") from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure("ended")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failure(f"failed ({reply['error']})")
        return reply

    def _failure(self, state: str) -> PrismError:
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()]
        reason = f": {lines[-1].strip()}" if lines else ""
        return PrismError(
            f"llama.cpp worker {state}{reason}; check that --llama-python has llama_cpp and that the GGUF is intact"
        )
