"""Starting and stopping the server: nothing is ever left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import math
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from prism_trt.client.generate import Options, stream_generate
from prism_trt.deploy import keeper
from prism_trt.deploy.app import _check_seconds, _Stop, _StopSignals, app
from prism_trt.deploy.readiness import READY, Readiness
from prism_trt.deploy.repository import MANIFEST
from prism_trt.deploy.server import (
    TritonServer,
    find_triton,
    free_port,
    make_runtime_directory,
    preflight,
    server_environment,
    sweep,
)
from prism_trt.deploy.supervisor import Supervision, Supervisor
from prism_trt.errors import PrismError
from tests.deploy.conftest import SLOTS
from tests.deploy.load import LONG
from tests.deploy.supervised import run_to_the_end

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")
PATIENCE = 60
"""Seconds that even an overloaded machine needs not."""


def belongings(pid: int) -> list[Path]:
    """Shared memory and temporary directories of the servers that process `pid` started."""
    return [*SHARED_MEMORY.glob(f"prism_trt_{pid}_*"), *Path(tempfile.gettempdir()).glob(f"prism_trt_{pid}_*")]


def below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process], owner: int) -> None:
    assert [process for process in processes if process.is_running()] == []
    assert belongings(owner) == []


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """The test's own servers leave nothing; others may be running."""
    before = {*belongings(os.getpid()), *below(os.getpid())}
    yield
    assert {*belongings(os.getpid()), *below(os.getpid())} <= before


Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(engine_path: Path, tmp_path: Path) -> Iterator[Launch]:
    """Starts `python -m prism_trt.deploy --run`; kills it at the end if it is still there."""
    processes = []

    def start(
        grpc_port: int | None = None, grace: int = 0, readiness_port: int | None = None, options: tuple[str, ...] = ()
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "prism_trt.deploy", "--engine", engine_path, "--out", tmp_path / "repository"]
        command += ["--run", "--threads", 1, "--grace", grace, "--grpc-port", grpc_port or free_port()]
        command += ["--http-port", free_port(), "--metrics-port", free_port()]
        command += ["--readiness-port", readiness_port or free_port(), "--start-timeout", 10 * PATIENCE, *options]
        processes.append(
            subprocess.Popen(
                [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def await_line(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return
    pytest.fail(f"{lines} {process.communicate()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_deploy_run_until_a_signal(launch: Launch, number: int) -> None:
    port = free_port()
    process = launch(port)
    await_line(process, f"serving prism: gRPC 127.0.0.1:{port}")
    started = below(process.pid)
    assert [p.name() for p in started].count("tritonserver") == 1
    assert len(belongings(process.pid)) == 2
    # A stream that nobody closes keeps Triton itself from ending.
    stream = stream_generate(f"127.0.0.1:{port}", "fox", Options(max_tokens=LONG))
    next(stream)
    process.send_signal(number)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert output == "stopping\nstopped\n"
    assert errors == ""
    assert_gone(started, process.pid)
    stream.close()


def test_a_server_that_was_stopped_is_started_again_by_the_same_command(launch: Launch, tmp_path: Path) -> None:
    for _ in range(2):
        process = launch()
        await_line(process, "serving prism")
        process.terminate()
        assert process.wait(PATIENCE) == 0
    changed = launch(options=("--backlog", "3"))
    _, errors = changed.communicate(timeout=PATIENCE)
    assert changed.returncode == 2
    assert errors.endswith("repository already exists: choose another output path or pass --overwrite\n")
    assert errors.count("\n") == 1


def test_the_operators_key_opens_the_repository_and_only_triton_shows_it(launch: Launch, tmp_path: Path) -> None:
    key, http_port = "a-key-of-the-operator", free_port()
    (tmp_path / "key").write_text(key + "\n")
    process = launch(options=("--admin-key-file", str(tmp_path / "key"), "--http-port", str(http_port)))
    await_line(process, "serving prism")
    showing = [one.name() for one in (psutil.Process(process.pid), *below(process.pid)) if key in str(one.cmdline())]
    assert showing == ["tritonserver"]
    for action in ("unload", "load"):
        for headers, status in (({}, 403), ({"admin-key": key}, 200)):
            connection = http.client.HTTPConnection("127.0.0.1", http_port, timeout=PATIENCE)
            with contextlib.closing(connection):
                connection.request("POST", f"/v2/repository/models/prism/{action}", headers=headers)
                assert connection.getresponse().status == status
    process.terminate()
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output, errors) == (0, "stopping\nstopped\n", "")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--start-timeout", "inf"], "--start-timeout is inf: name seconds, at most 86400"),
        (["--hang-timeout", "inf"], "--hang-timeout is inf"),
        (["--grace", "1e300"], r"--grace is 1e\+300"),
        (["--grpc-port", "21002", "--metrics-port", "21002"], "--grpc-port and --metrics-port are both 21002: choose"),
        (["--readiness-port", "8000"], "--http-port and --readiness-port are both 8000"),
        (["--admin-key-file", "absent"], "cannot read the key absent: No such file"),
    ],
)
def test_bad_options_are_one_sentence_and_nothing_is_written(
    engine_path: Path, tmp_path: Path, options: list[str], sentence: str
) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app(), ["--engine", str(engine_path), "--out", str(out), "--run", *options])
    assert isinstance(result.exception, PrismError)
    assert re.match(sentence, str(result.exception))
    assert not out.exists()


def test_no_number_of_seconds_is_refused() -> None:
    with pytest.raises(PrismError, match="--grace is nan: name seconds"):
        _check_seconds({"--start-timeout": 5.0, "--grace": math.nan})


def test_a_key_without_a_server_is_refused(engine_path: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a-key-of-the-operator")
    arguments = [
        "--engine",
        str(engine_path),
        "--out",
        str(tmp_path / "out"),
        "--admin-key-file",
        str(tmp_path / "key"),
    ]
    result = CliRunner().invoke(app(), arguments)
    assert str(result.exception) == "--admin-key-file is for a server: pass --run as well"
    assert not (tmp_path / "out").exists()


def test_a_keeper_whose_launcher_died_at_once_leaves_nothing() -> None:
    runtime, lock = make_runtime_directory()
    command = [sys.executable, "-I", "-S", keeper.__file__]
    environment = {**os.environ, keeper.RUNTIME_VARIABLE: str(runtime)}
    done = subprocess.run(command, env=environment, input=b"", capture_output=True, check=False, timeout=PATIENCE)
    os.close(lock)
    assert (done.returncode, done.stdout, done.stderr) == (keeper.STOPPED, b"", b"")
    assert not runtime.exists()


def test_a_second_signal_skips_the_grace_period(launch: Launch) -> None:
    port = free_port()
    process = launch(port, grace=10 * PATIENCE)
    await_line(process, "serving")
    started = below(process.pid)
    stream = stream_generate(f"127.0.0.1:{port}", "fox", Options(max_tokens=LONG))
    next(stream)
    process.send_signal(signal.SIGINT)
    await_line(process, "stopping")
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert_gone(started, process.pid)
    stream.close()


@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.2])
def test_a_signal_while_starting(launch: Launch, tmp_path: Path, seconds: float) -> None:
    process = launch()
    time.sleep(seconds)
    started = below(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode in (0, 130)
    assert "Traceback" not in errors
    assert_gone(started, process.pid)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["repository"])
    assert not list(tmp_path.iterdir()) or (tmp_path / "repository" / MANIFEST).is_file()


def test_a_signal_that_an_import_swallowed_is_remembered() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signals = _StopSignals()
    try:
        signals.check()
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(_Stop):
            signals.check()
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_killed_launcher_leaves_nothing(launch: Launch) -> None:
    process = launch()
    await_line(process, "serving")
    started = below(process.pid)
    assert len(started) == 3
    process.kill()
    process.communicate(timeout=PATIENCE)
    psutil.wait_procs(started, timeout=PATIENCE)
    assert_gone(started, process.pid)


@pytest.mark.usefixtures("nothing_left")
def test_a_killed_keeper_takes_the_server_along(repository: Path) -> None:
    before = below(os.getpid())
    server = TritonServer(repository)
    server.start()
    started = [process for process in below(os.getpid()) if process not in before]
    (guard,) = [process for process in started if keeper.__file__ in process.cmdline()]
    assert len(started) == 3
    guard.kill()
    with pytest.raises(PrismError, match="the server ended by itself"):
        server.wait()
    _, alive = psutil.wait_procs(started, timeout=PATIENCE)
    assert alive == []
    server.stop()


@pytest.mark.usefixtures("nothing_left")
def test_a_dead_model_process_ends_the_server_instead_of_hanging_it(repository: Path) -> None:
    before = below(os.getpid())
    with TritonServer(repository) as server:
        stream = stream_generate(server.grpc_url, "fox", Options(max_tokens=LONG, timeout=PATIENCE))
        next(stream)
        started = [process for process in below(os.getpid()) if process not in before]
        (model,) = [process for process in started if process.name().startswith("triton_python")]
        model.kill()
        with pytest.raises(PrismError, match="the server answered"):
            list(stream)
        # Triton crashes of it at once where the model held a lock of their shared memory.
        with pytest.raises(PrismError, match=r"the server's model process died|the server ended by itself"):
            server.wait()


def named(name: str, processes: list[psutil.Process]) -> psutil.Process:
    """The launcher's keeper, its server, or its model process."""
    (found,) = [
        process
        for process in processes
        if (process.name() if name != "keeper" else " ".join(process.cmdline())).count(name)
    ]
    return found


def readiness(port: int) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", READY)
        response = connection.getresponse()
        return response.status, response.read().decode().strip()


@pytest.mark.parametrize(
    "victim",
    [
        "triton_python",
        pytest.param("tritonserver", marks=pytest.mark.slow),
        pytest.param("keeper", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_dies_is_replaced(launch: Launch, victim: str) -> None:
    grpc_port, readiness_port = free_port(), free_port()
    process = launch(grpc_port, readiness_port=readiness_port)
    await_line(process, "serving")
    assert readiness(readiness_port) == (200, "ready")
    url, short = f"127.0.0.1:{grpc_port}", Options(max_tokens=20, timeout=10 * PATIENCE)
    before = [chunk.text for chunk in stream_generate(url, "fox", short)]
    streams = [stream_generate(url, "fox", Options(max_tokens=LONG, timeout=10 * PATIENCE)) for _ in range(SLOTS)]
    for stream in streams:
        next(stream)
    started = below(process.pid)
    named(victim, started).kill()
    await_line(process, "restart 1 of 5 in 1 s: the server")
    assert readiness(readiness_port)[0] == 503
    for stream in streams:
        with pytest.raises(PrismError, match="the server answered"):
            list(stream)
    await_line(process, "serving again after")
    assert readiness(readiness_port) == (200, "ready")
    assert not [one for one in started if one.is_running()]
    assert "".join(chunk.text for chunk in stream_generate(url, "fox", short)) == "".join(before)
    started = below(process.pid)
    process.terminate()
    assert process.wait(PATIENCE) == 0
    assert_gone(started, process.pid)


QUICK = {"canary_interval": 0.2, "canary_patience": 5.0, "hang_timeout": 1.0, "first_delay": 0.01}


@pytest.mark.usefixtures("nothing_left")
def test_a_server_that_hangs_is_replaced(repository: Path) -> None:
    state, said = Readiness(), queue.Queue[str]()
    before = below(os.getpid())

    def model() -> psutil.Process:
        return named("triton_python", [process for process in below(os.getpid()) if process not in before])

    with TritonServer(repository, grace=0, start_timeout=10 * PATIENCE) as server:
        supervisor = Supervisor(server, Supervision(**QUICK, restarts=1), state, said.put)
        watching = threading.Thread(target=run_to_the_end, args=(supervisor, said), daemon=True)
        watching.start()
        hanging = model()
        hanging.suspend()
        assert "restart 1 of 1 in 0.01 s: the model has not worked for" in said.get(timeout=10 * PATIENCE)
        assert state.problem is not None
        assert said.get(timeout=10 * PATIENCE).startswith("serving again")
        server.probe(PATIENCE)
        assert not hanging.is_running()
        assert state.problem is None
        model().kill()
        assert "restart" not in said.get(timeout=10 * PATIENCE), "it gave up, as it was told"
        watching.join(PATIENCE)


@pytest.mark.usefixtures("nothing_left")
def test_restarts_are_bounded(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    before = below(os.getpid())
    said: list[str] = []
    with TritonServer(copy, grace=0, start_timeout=10 * PATIENCE) as server:
        tokenizer = copy / "prism" / "1" / "engine" / "tokenizer" / "tokenizer.json"
        tokenizer.write_bytes(b"x" * tokenizer.stat().st_size)
        named("triton_python", [process for process in below(os.getpid()) if process not in before]).kill()
        with pytest.raises(PrismError, match=r"the server could not start: .* is not a valid tokenizer"):
            Supervisor(server, Supervision(**QUICK, restarts=2), Readiness(), said.append).run()
    assert [line.split(":")[0] for line in said] == ["restart 1 of 2 in 0.01 s", "restart 2 of 2 in 0.02 s"]


def test_a_server_that_ends_without_a_word(repository: Path) -> None:
    server = TritonServer(repository)
    server._keeper = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({keeper.SERVER_ENDED})"])
    with pytest.raises(PrismError, match=r"^the server ended by itself, and its log does not say why$"):
        server.wait(PATIENCE)


def test_restarts_are_said_with_the_end_of_the_log_and_readiness_without(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, state = TritonServer(repository), Readiness()
    problem = "the server ended by itself: the end of its log:\nSegmentation fault in /home"

    def ended(_: float | None = None) -> bool:
        raise PrismError(problem)

    monkeypatch.setattr(server, "wait", ended)
    monkeypatch.setattr(server, "start", lambda: None)
    said: list[str] = []
    with pytest.raises(PrismError, match="Segmentation fault"):
        Supervisor(server, Supervision(**QUICK, restarts=1), state, said.append).run()
    assert said[0] == f"restart 1 of 1 in 0.01 s: {problem}"
    assert state.problem == "the server ended by itself"


def test_delays_between_restarts_double_up_to_a_bound() -> None:
    supervision = Supervision(first_delay=1, longest_delay=5)
    assert [supervision.delay(restart) for restart in (1, 2, 3, 4, 50)] == [1, 2, 4, 5, 5]


def test_a_busy_model_is_not_taken_for_a_hanging_one(server: TritonServer) -> None:
    streams = [stream_generate(server.grpc_url, "fox", Options(max_tokens=LONG)) for _ in range(SLOTS)]
    for stream in streams:
        next(stream)
    server.probe(timeout=0.6)
    assert all(next(stream).statistics is None for stream in streams)
    for stream in streams:
        stream.close()


def test_the_next_start_removes_what_a_killed_launcher_and_keeper_left(launch: Launch, server: TritonServer) -> None:
    process = launch()
    await_line(process, "serving")
    started = below(process.pid)
    guard, model = named("keeper", started), named("triton_python", started)
    guard.suspend()
    model.suspend()  # as one that hangs; it cannot notice that its server has gone
    process.kill()
    process.communicate(timeout=PATIENCE)
    sweep()
    assert len(belongings(process.pid)) == 2, "the keeper still lives"
    guard.kill()
    psutil.wait_procs([one for one in started if one != model], timeout=PATIENCE)
    assert model.is_running()
    sweep()
    psutil.wait_procs(started, timeout=PATIENCE)
    assert_gone(started, process.pid)
    server.probe()


def test_port_in_use(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PrismError, match=rf"port {port} cannot be used \(Address already in use\).*--grpc-port"):
            TritonServer(repository, grpc_port=port).start()
    with pytest.raises(PrismError, match="port 99999 cannot be used"):
        TritonServer(repository, http_port=99999).start()


def test_a_damaged_repository_is_refused(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(PrismError, match=r"repository\.json is damaged"):
        TritonServer(copy)
    shutil.copy(repository / MANIFEST, copy)
    (copy / "prism" / "config.pbtxt").write_text("")
    with pytest.raises(PrismError, match=r"config\.pbtxt has 0 bytes"):
        TritonServer(copy)
    with pytest.raises(PrismError, match="is not a directory"):
        TritonServer(tmp_path / "absent")


@pytest.mark.usefixtures("nothing_left")
def test_a_model_that_does_not_load_is_one_sentence(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy)
    tokenizer = copy / "prism" / "1" / "engine" / "tokenizer" / "tokenizer.json"
    tokenizer.write_bytes(b"x" * tokenizer.stat().st_size)
    with pytest.raises(PrismError) as refused:
        TritonServer(copy).start()
    assert str(refused.value).startswith(f"the server could not start: {tokenizer} is not a valid tokenizer.json")
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("nothing_left")
def test_a_server_that_takes_too_long_is_ended(repository: Path) -> None:
    with pytest.raises(PrismError, match=r"was not ready within 0\.2 s"):
        TritonServer(repository, start_timeout=0.2, grace=0).start()


@pytest.mark.usefixtures("nothing_left")
def test_the_log_is_kept_on_request(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="cannot write the log"):
        TritonServer(repository, log=tmp_path / "absent" / "log").start()
    with TritonServer(repository, log=tmp_path / "log", grace=0):
        pass
    assert "loaded the engine in" in (tmp_path / "log").read_text()


def test_preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = find_triton()
    environment = server_environment(files)
    preflight(files, environment)
    shutil.copy(files.stub, tmp_path / "stub")
    with pytest.raises(PrismError, match=r"the Triton model process misses libcudart\S+: use a Python"):
        preflight(dataclasses.replace(files, stub=tmp_path / "stub"), {**environment, "LD_LIBRARY_PATH": ""})
    monkeypatch.setattr(np, "__version__", "2.4.6")
    with pytest.raises(PrismError, match=r"corrupts tensors with numpy 2\.4\.6: pip install 'numpy<2'"):
        preflight(files, environment)


def test_unsupported_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(PrismError, match=r"cannot run models on Python 3\.13: use Python 3\.10, 3\.11 or 3\.12"):
        find_triton()


def test_without_pytriton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    with pytest.raises(PrismError, match="nvidia-pytriton, which holds the Triton server, is not installed"):
        find_triton()
