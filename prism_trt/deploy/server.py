"""Start, watch and stop the `tritonserver` of the `nvidia-pytriton` wheel.

The wheel's server and stub are used as they are; pytriton's own Python code is not. Every server has a keeper process
(`prism_trt.deploy.keeper`), so neither Ctrl-C nor the sudden death of the launcher leaves a process, a file or a shared
memory region. What a launcher leaves that is killed together with its keeper, the next start removes.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import http.client
import importlib.util
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from prism_trt.deploy import admin, keeper
from prism_trt.deploy.canary import ask_for_a_token
from prism_trt.deploy.repository import read_repository
from prism_trt.errors import PrismError

HOST = "127.0.0.1"
LOG_FOLLOWS = ": the end of its log:"
"""How the first line of an error ends that the log's last lines follow."""
_RUNTIME_PREFIX, _LOCK = "prism_trt_", "lock"
_POLL_SECONDS = 0.03
_TAIL_LINES, _LOG_BYTES = 12, 1 << 16
_LINE_CHARACTERS = 400
_LOAD_FAILURE = re.compile(
    r"failed to load '.*?' version \d+: \w+: (?:TritonModelException: )?(.*?)(?:\\n|\"$)", re.MULTILINE
)
_CHATTER = re.compile(r"I\d{4} |[|+][ -]")
_INSTALL = "install it with: pip install nvidia-pytriton 'numpy<2'"


@dataclass(frozen=True)
class TritonFiles:
    """Where the parts of the server are."""

    server: Path
    backend: Path
    stub: Path
    libraries: Path


def find_triton() -> TritonFiles:
    """Locate the server inside the installed `nvidia-pytriton` wheel.

    Raises:
        PrismError: the wheel is missing, incomplete, or has no stub for this Python version.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise PrismError(f"nvidia-pytriton, which holds the Triton server, is not installed: {_INSTALL}")
    package = Path(next(iter(spec.submodule_search_locations)))
    version = ".".join(map(str, sys.version_info[:2]))
    root = package / "tritonserver"
    files = TritonFiles(
        server=root / "bin" / "tritonserver",
        backend=root / "backends" / "python",
        stub=root / "python_backend_stubs" / version / "triton_python_backend_stub",
        libraries=package.parent / "nvidia_pytriton.libs",
    )
    if sys.version_info[:2] not in ((3, 10), (3, 11), (3, 12)) or not files.stub.is_file():
        raise PrismError(f"the Triton server cannot run models on Python {version}: use Python 3.10, 3.11 or 3.12")
    for path in (files.server, files.backend, files.libraries):
        if not path.exists():
            raise PrismError(f"nvidia-pytriton is incomplete ({path} is missing): {_INSTALL} --force-reinstall")
    return files


def server_environment(files: TritonFiles) -> dict[str, str]:
    """Environment in which the server's stub runs on this interpreter's packages."""
    environment = dict(os.environ)
    library_path = [
        sysconfig.get_config_var("LIBDIR") or "",
        str(files.libraries),
        environment.get("LD_LIBRARY_PATH", ""),
    ]
    environment["LD_LIBRARY_PATH"] = ":".join(part for part in library_path if part)
    environment["PATH"] = f"{Path(sys.prefix) / 'bin'}:{environment.get('PATH', os.defpath)}"
    python_path = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = ":".join(part for part in python_path if part)
    environment.pop("PYTHONHOME", None)
    return environment


def preflight(files: TritonFiles, environment: dict[str, str]) -> None:
    """Refuse what Triton would answer with a hang or with corrupted tensors.

    Raises:
        PrismError: numpy 2 is installed, or the stub misses a shared library.
    """
    import numpy

    if int(numpy.__version__.split(".")[0]) >= 2:
        raise PrismError(f"this Triton server corrupts tensors with numpy {numpy.__version__}: pip install 'numpy<2'")
    listing = subprocess.run(["ldd", str(files.stub)], env=environment, capture_output=True, text=True, check=False)
    missing = [line.split()[0] for line in listing.stdout.splitlines() if "not found" in line]
    if missing:
        raise PrismError(
            f"the Triton model process misses {', '.join(missing)}: use a Python built with a shared library, or "
            f"install your system's libpython package"
        )


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def check_port(port: int, option: str) -> None:
    """Raises PrismError when `port` of the loopback interface cannot be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a port number"
            raise PrismError(f"port {port} cannot be used ({reason}): choose another with {option}") from None


def make_runtime_directory() -> tuple[Path, int]:
    """A new runtime directory and the descriptor that locks it: until it and every inherited copy are closed."""
    runtime = Path(tempfile.mkdtemp(prefix=f"{_RUNTIME_PREFIX}{os.getpid()}_"))
    unlocked = runtime / f"{_LOCK}.new"
    lock = os.open(unlocked, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    # No sweep finds the lock before it is held.
    unlocked.rename(runtime / _LOCK)
    return runtime, lock


def sweep() -> None:
    """Remove what servers left whose keepers were killed together with their launchers."""
    for runtime in Path(tempfile.gettempdir()).glob(_RUNTIME_PREFIX + "*"):
        with contextlib.suppress(OSError):  # locked, gone meanwhile, or somebody else's
            if runtime.stat().st_uid != os.getuid():
                continue
            lock = os.open(runtime / _LOCK, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                keeper.remove_belongings(runtime)
            finally:
                os.close(lock)


class TritonServer:
    """A running server over a model repository; a context manager.

    Binds the loopback interface only and keeps the shared-memory and administration protocols behind `admin_key`,
    because Triton 2.51 has known remote-code-execution flaws in them.

    Args:
        repository: directory written by `prism_trt.deploy.repository.write_repository`.
        grpc_port, http_port, metrics_port: TCP ports; None picks a free one.
        log: file that receives the server's output; None keeps it only for error messages.
        start_timeout: seconds until the server must have generated its first token.
        grace: seconds that open requests get when the server is stopped.
        admin_key: lets its holders unload and load the model; None: a random one of this object, and nobody may.
    """

    def __init__(
        self,
        repository: Path,
        *,
        grpc_port: int | None = None,
        http_port: int | None = None,
        metrics_port: int | None = None,
        log: Path | None = None,
        start_timeout: float = 120.0,
        grace: float = 10.0,
        admin_key: str | None = None,
    ) -> None:
        self.repository = Path(repository).absolute()
        self.model_name: str = read_repository(self.repository)["model"]
        self.admin_key = admin_key or secrets.token_urlsafe(16)
        self._exchangeable = admin_key is not None
        self._ports = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        self._log_path = log
        self._log: IO[bytes] | None = None
        self._start_timeout = start_timeout
        self._grace = grace
        self._keeper: subprocess.Popen[bytes] | None = None
        self._runtime: Path | None = None
        self._log_start = 0

    @property
    def grpc_url(self) -> str:
        """``host:port`` of the gRPC endpoint."""
        return f"{HOST}:{self._ports['grpc']}"

    @property
    def http_url(self) -> str:
        """Base URL of the HTTP endpoint."""
        return f"http://{HOST}:{self._ports['http']}"

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus page."""
        return f"http://{HOST}:{self._ports['metrics']}/metrics"

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and generate one token with it. A server that has been stopped may be started again.

        Raises:
            PrismError: a preflight check failed, or the server did not become ready; the sentence is followed by the
                end of the server's log.
        """
        files = find_triton()
        environment = server_environment(files)
        preflight(files, environment)
        sweep()
        for name, port in self._ports.items():
            if port is None:
                self._ports[name] = free_port()
            else:
                check_port(port, f"--{name}-port")
        try:
            self._launch(files, environment)
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def _launch(self, files: TritonFiles, environment: dict[str, str]) -> None:
        try:
            # Closed by stop(). An unnamed file needs no removal.
            self._log = tempfile.TemporaryFile() if self._log_path is None else self._log_path.open("ab+")  # noqa: SIM115
        except OSError as error:
            raise PrismError(f"cannot write the log {self._log_path}: {error.strerror}") from None
        self._log_start = os.fstat(self._log.fileno()).st_size
        self._runtime, lock = make_runtime_directory()
        backend = self._runtime / "backends" / "python"
        backend.mkdir(parents=True)
        for source in (*files.backend.iterdir(), files.stub):
            (backend / source.name).symlink_to(source)
        plan = {
            "parent": os.getpid(),
            "command": self._command(files, self._runtime),
            "runtime": str(self._runtime),
            "grace": self._grace,
        }
        atexit.register(self.stop)
        try:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", keeper.__file__],
                env={**environment, keeper.RUNTIME_VARIABLE: str(self._runtime)},
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
            )
        finally:
            os.close(lock)
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._keeper.stdin as pipe:  # it may have been killed already
            pipe.write(json.dumps(plan).encode())

    def _command(self, files: TritonFiles, runtime: Path) -> list[str]:
        options = {
            "model-repository": self.repository,
            "backend-directory": runtime / "backends",
            "backend-config": f"python,shm-region-prefix-name={keeper.shm_prefix(runtime)}",
            "allow-gpu-metrics": "false",
            "exit-timeout-secs": max(1, round(self._grace)),
            "grpc-restricted-protocol": admin.restriction(self.admin_key),
            "http-restricted-api": admin.restriction(self.admin_key),
        }
        if self._exchangeable:
            options |= {"model-control-mode": "explicit", "load-model": self.model_name}
        for name, port in self._ports.items():
            options |= {f"{name}-port": port, f"{name}-address": HOST}
        arguments = [f"--{name}={value}" for name, value in options.items()]
        return [str(files.server), "--disable-auto-complete-config", *arguments]

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while not self._http_ready():
            if self._keeper is None or self._keeper.poll() is not None:
                raise PrismError(f"the server could not start{self._cause()}")
            if time.monotonic() > deadline:
                raise PrismError(f"the server was not ready within {self._start_timeout:g} s{self._cause()}")
            time.sleep(_POLL_SECONDS)
        self.probe(timeout=max(1.0, deadline - time.monotonic()))

    def _http_ready(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._ports["http"] or 0, timeout=2)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def probe(self, timeout: float = 10.0) -> None:
        """Have one token generated. The server's own health endpoint stays green when its model hangs; this does not.

        Raises:
            PrismError: as `prism_trt.deploy.canary.ask_for_a_token`.
        """
        ask_for_a_token(self.grpc_url, self.model_name, timeout)

    def absence(self) -> str | None:
        """Why the model cannot be used although the server works: a holder of the key has unloaded it. Otherwise None.

        Raises nothing: a server that cannot be asked has not said that.
        """
        if not self._exchangeable:
            return None
        return admin.absence(HOST, self._ports["http"] or 0, self.admin_key, self.model_name)

    def _cause(self) -> str:
        """What follows a sentence: why the model could not be loaded, or else the end of the log."""
        text = self._output()
        if refused := _LOAD_FAILURE.findall(text):
            return f": {refused[-1]}"
        telling = [line for line in text.splitlines() if line.strip() and not _CHATTER.match(line)]
        tail = "\n".join(line[:_LINE_CHARACTERS] for line in telling[-_TAIL_LINES:])
        return f"{LOG_FOLLOWS}\n{tail}" if tail else ", and its log does not say why"

    def _output(self) -> str:
        """The end of what the server has printed."""
        if self._log is None:
            return ""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), _LOG_BYTES, max(self._log_start, size - _LOG_BYTES)).decode(
            errors="replace"
        )

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the server has been stopped; False when it still runs after `timeout` seconds.

        Raises:
            PrismError: it ended although nobody stopped it.
        """
        if self._keeper is None:
            return True
        try:
            code = self._keeper.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        if code != keeper.STOPPED:
            cause = "the server's model process died" if code == keeper.MODEL_DIED else "the server ended by itself"
            raise PrismError(f"{cause}{self._cause()}")
        return True

    def stop(self, now: bool = False) -> None:
        """End the server. Idempotent.

        Open requests get the grace period, unless `now` is set or a second interrupt arrives; those that have not
        ended then end with an error.
        """
        process = self._keeper
        if process is not None:
            try:
                process.send_signal(keeper.STOP_NOW if now else signal.SIGTERM)
                process.wait()
            except BaseException:
                process.send_signal(keeper.STOP_NOW)
                process.wait()
                raise
            self._keeper = None
        atexit.unregister(self.stop)
        if self._runtime is not None:
            # The keeper has done this already, unless it was killed.
            keeper.remove_belongings(self._runtime)
            self._runtime = None
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = None
