"""The process between a launcher and its `tritonserver`: it outlives neither and leaves nothing behind.

Run as a script (``python -I -S keeper.py``) by `prism_trt.deploy.server`, which writes the plan to its standard input:
other users of the machine can read command lines, and the plan holds a key. It uses the standard library only, so that
it starts in milliseconds. It ends the server, with every process below it, when

- it gets SIGTERM (a second one skips the grace period) or SIGUSR1 (no grace period at all),
- the launcher dies, however it dies,
- a model process dies that was not unloaded: Triton 2.51 would keep answering "ready" while open streams hang for ever.

Afterwards it removes the server's shared memory and its runtime directory. Should it be killed together with its
launcher, the next start does so: the keeper holds the lock of the runtime directory for as long as it lives.

Exit codes: 0 stopped on request, 1 the server ended by itself, 2 a model process died.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

STOPPED, SERVER_ENDED, MODEL_DIED = 0, 1, 2
STOP_NOW = signal.SIGUSR1
RUNTIME_VARIABLE = "PRISM_TRT_RUNTIME"
"""Environment variable with the runtime directory."""
MODEL_PREFIX = "model-"
"""A model process announces itself by creating ``<runtime>/model-<pid>``, and removes that when it is unloaded."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SCAN_MILLISECONDS = 500
_KILL_MARGIN_SECONDS = 2.0
_FLUSH_SECONDS = 0.3


def prctl(option: int, value: int) -> None:
    """Set a process attribute; Linux only."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def shm_prefix(runtime: Path) -> str:
    """What the names of the shared memory regions begin with of the server whose runtime directory this is."""
    return f"{runtime.name}_"


def remove_belongings(runtime: Path) -> None:
    """Remove what a server that has ended leaves: processes, shared memory and its runtime directory."""
    for pid in _processes(runtime):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for region in Path("/dev/shm").glob(shm_prefix(runtime) + "*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(runtime, ignore_errors=True)


def _processes(runtime: Path) -> Iterator[int]:
    """Every other process that was started with this runtime directory in its environment."""
    mark = f"{RUNTIME_VARIABLE}={runtime}".encode()
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    yield int(process.name)


class Keeper:
    """Owns one server process group. `plan` holds parent, command, runtime and grace (seconds)."""

    def __init__(self, plan: dict) -> None:
        self.parent: int = plan["parent"]
        self.runtime = Path(plan["runtime"])
        self.grace: float = plan["grace"]
        self.poller = select.poll()
        self.models: dict[int, str] = {}
        """pidfd of each model process -> its announcement."""
        self.signals = self._signal_pipe()
        self.parent_fd = os.pidfd_open(self.parent)
        # The server gets a session of its own (no Ctrl-C from the terminal) and dies with the keeper.
        self.server = subprocess.Popen(
            plan["command"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        self.server_fd = os.pidfd_open(self.server.pid)
        for fd in (self.signals, self.parent_fd, self.server_fd):
            self.poller.register(fd, select.POLLIN)

    @staticmethod
    def _signal_pipe() -> int:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for number in (signal.SIGTERM, STOP_NOW):
            signal.signal(number, lambda *_: None)
        return reader

    def run(self) -> int:
        """Keep until something ends, then end everything. Returns the exit code."""
        code = STOPPED
        while os.getppid() == self.parent:
            ended = {fd for fd, _ in self.poller.poll(_SCAN_MILLISECONDS)}
            if self.server_fd in ended:
                code = SERVER_ENDED
                break
            if ended & {self.signals, self.parent_fd}:
                break
            if dead := self._died(ended & self.models.keys()):
                code = self._after_model_death(dead)
                break
            self._watch_new_models()
        if code == STOPPED:
            self._stop_politely()
        self._sweep()
        return code

    def _watch_new_models(self) -> None:
        known = set(self.models.values())
        for file in self.runtime.glob(MODEL_PREFIX + "*"):
            if file.name not in known:
                with contextlib.suppress(ProcessLookupError, ValueError):
                    fd = os.pidfd_open(int(file.name[len(MODEL_PREFIX) :]))
                    self.models[fd] = file.name
                    self.poller.register(fd, select.POLLIN)

    def _died(self, ended: set[int]) -> str | None:
        """The announcement of a model process that died; those that ended because they were unloaded are forgotten."""
        for fd in ended:
            if (self.runtime / self.models[fd]).exists():
                return self.models[fd]
            self._forget(fd)
        return None

    def _forget(self, fd: int) -> None:
        self.poller.unregister(fd)
        del self.models[fd]
        os.close(fd)

    def _after_model_death(self, model: str) -> int:
        # A server that is stopping by itself ends its model processes first; one that loses a model may crash of that.
        waiter = select.poll()
        waiter.register(self.server_fd, select.POLLIN)
        if waiter.poll(1000 * _KILL_MARGIN_SECONDS) and self.server.wait() >= 0:
            return SERVER_ENDED
        print(f"keeper: {model} died; stopping the server", file=sys.stderr, flush=True)
        return MODEL_DIED

    def _stop_politely(self) -> None:
        """Ask the server to end and wait until it has, the grace period is over, or a second signal arrives."""
        with contextlib.suppress(BlockingIOError):
            if os.read(self.signals, 1)[0] == STOP_NOW:
                return
        self.server.terminate()
        # An open gRPC stream keeps the server alive past its own exit timeout.
        deadline = time.monotonic() + self.grace + _KILL_MARGIN_SECONDS
        self.poller.unregister(self.parent_fd)
        self._watch_new_models()
        while (left := deadline - time.monotonic()) > 0:
            ended = {fd for fd, _ in self.poller.poll(1000 * left)}
            if ended & {self.signals, self.server_fd}:
                return
            for fd in ended & self.models.keys():
                self._forget(fd)
            if ended and not self.models:
                # All requests are answered; the server itself would take another second or two.
                deadline = min(deadline, time.monotonic() + _FLUSH_SECONDS)

    def _sweep(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break
            time.sleep(0.01)
        remove_belongings(self.runtime)


def main() -> int:
    """Read the plan from standard input and keep."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    plan = sys.stdin.read()
    if not plan:  # the launcher died before it wrote it
        remove_belongings(Path(os.environ[RUNTIME_VARIABLE]))
        return STOPPED
    return Keeper(json.loads(plan)).run()


if __name__ == "__main__":
    sys.exit(main())
