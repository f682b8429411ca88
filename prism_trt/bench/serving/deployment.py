"""`python -m prism_trt.deploy --run` as a process of its own, with what can be seen of it from outside."""

from __future__ import annotations

import http.client
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

from prism_trt.bench.serving.results import Memory
from prism_trt.deploy.server import HOST, free_port
from prism_trt.errors import PrismError

Role = Literal["keeper", "server", "model"]
_FILES: dict[Role, str] = {"keeper": "/keeper.py", "server": "/tritonserver", "model": "/triton_python_backend_stub"}
_PAGE = os.sysconf("SC_PAGE_SIZE")
_STOP_SECONDS = 120.0


class Deployment:
    """A launcher with its server; a context manager that ends both.

    Args:
        engine: engine directory.
        repository: model repository to write.
        start_timeout: seconds until it must serve.
        options: further command line options.
        ports: gRPC, HTTP, metrics and readiness; None picks free ones.
    """

    def __init__(
        self,
        engine: Path,
        repository: Path,
        start_timeout: float,
        options: tuple[str, ...] = (),
        ports: tuple[int, int, int, int] | None = None,
    ) -> None:
        self.ports = ports or (free_port(), free_port(), free_port(), free_port())
        self.grpc_url = f"{HOST}:{self.ports[0]}"
        self.start_timeout = start_timeout
        names = ("--grpc-port", "--http-port", "--metrics-port", "--readiness-port")
        command = [sys.executable, "-m", "prism_trt.deploy", "--engine", str(engine), "--out", str(repository), "--run"]
        command += ["--overwrite", "--start-timeout", str(start_timeout), *options]
        for name, port in zip(names, self.ports, strict=True):
            command += [name, str(port)]
        self._began = time.perf_counter()
        self._lines: queue.Queue[tuple[float, str]] = queue.Queue()
        self._said: list[str] = []
        self.launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.start_seconds = 0.0

    def __enter__(self) -> Deployment:
        try:
            self.start_seconds = self.await_line("serving", self.start_timeout + 60) - self._began
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.launcher.poll() is None:
            self.launcher.terminate()
        self.launcher.wait(_STOP_SECONDS)
        self._reader.join()

    def _read(self) -> None:
        assert self.launcher.stdout is not None
        for line in self.launcher.stdout:
            self._lines.put((time.perf_counter(), line))
            self._said.append(line.rstrip())
        self._lines.put((time.perf_counter(), ""))

    def await_line(self, beginning: str, seconds: float) -> float:
        """When (`time.perf_counter`) the launcher printed a line that starts like this.

        Raises:
            PrismError: it did not within `seconds`, or it has ended.
        """
        deadline = time.perf_counter() + seconds
        while True:
            try:
                when, line = self._lines.get(timeout=max(0.0, deadline - time.perf_counter()))
            except queue.Empty:
                raise PrismError(
                    f"the launcher has not printed {beginning!r} within {seconds:g} s: see above"
                ) from None
            if line.startswith(beginning):
                return when
            if not line:
                raise PrismError(f"the launcher ended before it printed {beginning!r}: see above")

    def incidents(self) -> tuple[str, ...]:
        """What the launcher has said of servers that died or hung."""
        return tuple(line for line in self._said if line.startswith("restart"))

    def ready(self) -> bool:
        """What the readiness endpoint says."""
        connection = http.client.HTTPConnection(HOST, self.ports[3], timeout=10)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def processes(self) -> dict[Role, int]:
        """Process numbers by role."""
        found: dict[Role, int] = {}
        for pid in descendants(self.launcher.pid):
            words = command_of(pid)[:4]  # the program and what runs it, not its arguments
            found |= {role: pid for role, file in _FILES.items() if any(word.endswith(file) for word in words)}
        return found

    def memory(self) -> Memory:
        """Memory of its processes now."""
        processes = self.processes()
        return Memory(
            server=resident_bytes(processes["server"]),
            model=resident_bytes(processes["model"]),
            shared=sum(region.stat().st_size for region in self.shared_memory()),
        )

    def shared_memory(self) -> list[Path]:
        """Its shared memory regions."""
        return list(Path("/dev/shm").glob(f"prism_trt_{self.launcher.pid}_*"))


def descendants(pid: int) -> list[int]:
    """Processes below `pid`."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def command_of(pid: int) -> list[str]:
    """The command line of a process; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
