"""Servers behind the real nginx with the shipped configuration: killed under load, asked to stop, silent for long.

Where one is killed, requests go over gRPC and through the front end in turn.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from prism_trt.client.generate import Options, stream_generate
from prism_trt.deploy.server import TritonServer, free_port
from prism_trt.errors import PrismError
from prism_trt.resources import resource
from tests.deploy.conftest import SLOTS
from tests.deploy.load import LONG
from tests.frontend.conftest import Frontend, running

STOPPED = re.compile(r'^prism_failed_requests_total{.*cause="cancelled".*} (\S+)$', re.MULTILINE)
MILLISECONDS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
REQUESTS, AT_ONCE = 60, 8
OPTIONS = Options(max_tokens=120, chat=False, timeout=60)


@contextmanager
def nginx(servers: tuple[str, str], directory: Path, faster: int = 1) -> Iterator[str]:
    """nginx with the shipped configuration, its addresses replaced; yields its own.

    Debian's knows no `resolve`, which addresses do not need.

    Args:
        servers: gRPC addresses.
        directory: for its files.
        faster: divides the times for which it waits for servers and clients.
    """
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    assert binary, "this test needs nginx: install your system's nginx package"
    address = f"127.0.0.1:{free_port()}"
    text = (resource("deploy") / "nginx.conf").read_text()
    replacements = {
        "triton-a:8001": servers[0],
        "triton-b:8001": servers[1],
        " resolve;": ";",
        "listen 8001": f"listen {address}",
        "/tmp/": f"{directory}/",
    }
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    for name in ("client_body_timeout", "grpc_read_timeout"):
        text, count = re.subn(
            rf"({name}) (\d+)([smhd]);",
            lambda time: f"{time[1]} {int(time[2]) * MILLISECONDS[time[3]] // faster}ms;",
            text,
        )
        assert count == 1
    configuration = directory / "nginx.conf"
    configuration.write_text(text)
    subprocess.run([binary, "-t", "-c", str(configuration)], check=True)
    process = subprocess.Popen([binary, "-g", "daemon off;", "-c", str(configuration)])
    try:
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def tritonserver_of(server: TritonServer) -> psutil.Process:
    """The process that holds the server's gRPC port."""
    port = int(server.grpc_url.split(":")[1])
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "tritonserver" and any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for connection in process.net_connections()
        ):
            return process
    raise AssertionError(f"nothing listens on {port}")


def over_grpc(address: str) -> Iterator[tuple[str, bool]]:
    """Pieces of an answer, and whether each is the last."""
    for chunk in stream_generate(address, "fox", OPTIONS):
        yield chunk.text, chunk.statistics is not None


def over_http(frontend: Frontend) -> Iterator[tuple[str, bool]]:
    """The same through the front end."""
    arguments = {"model": "prism", "prompt": "fox", "max_tokens": OPTIONS.max_tokens, "temperature": 0}
    for chunk in frontend.openai().completions.create(**arguments, stream=True):
        yield chunk.choices[0].text, chunk.choices[0].finish_reason is not None


@pytest.mark.slow
def test_no_request_vanishes_when_a_server_is_killed(repository: Path, tmp_path: Path) -> None:
    with (
        TritonServer(repository) as dying,
        TritonServer(repository) as other,
        nginx((dying.grpc_url, other.grpc_url), tmp_path) as address,
        running(address, "--timeout", str(OPTIONS.timeout)) as frontend,
    ):
        whole = "".join(text for text, _ in over_grpc(other.grpc_url))

        def attempt(number: int) -> str:
            if number == REQUESTS // 3:
                tritonserver_of(dying).send_signal(signal.SIGKILL)
            received, ended = "", False
            try:
                for text, last in over_grpc(address) if number % 2 else over_http(frontend):
                    received += text
                    ended = ended or last
            except (PrismError, openai.APIError) as error:
                assert whole.startswith(received)
                return "silent" if "nothing" in str(error) else "error"
            # An answer without its end must not look like a whole one.
            assert ended
            assert received == whole
            return "answer"

        with ThreadPoolExecutor(AT_ONCE) as pool:
            outcomes = Counter(pool.map(attempt, range(REQUESTS)))
        assert outcomes["silent"] == 0
        assert outcomes["error"] <= 2 * AT_ONCE  # those that ran on the killed server
        assert outcomes["answer"] == REQUESTS - outcomes["error"]

        for number in range(AT_ONCE):
            assert attempt(number) == "answer"
        with (
            grpcclient.InferenceServerClient(address) as client,
            pytest.raises(InferenceServerException, match="PERMISSION_DENIED"),
        ):
            client.get_system_shared_memory_status()


@pytest.mark.slow
def test_requests_are_stopped_on_the_server_that_runs_them(repository: Path, tmp_path: Path) -> None:
    with (
        TritonServer(repository) as one,
        TritonServer(repository) as other,
        nginx((one.grpc_url, other.grpc_url), tmp_path) as address,
        running(address) as frontend,
    ):
        streams = [stream_generate(address, "fox", Options(max_tokens=LONG)) for _ in range(SLOTS)]
        for stream in streams:
            next(stream)
        for stream in streams:
            stream.close()
        for _ in range(SLOTS):
            body = {"model": "prism", "prompt": "fox", "max_tokens": LONG, "temperature": 0, "stream": True}
            with httpx.stream("POST", f"{frontend.url}/completions", json=body, timeout=60) as reply:
                next(reply.iter_raw())
        stopped, deadline = [0.0, 0.0], time.monotonic() + 60
        while sum(stopped) < 2 * SLOTS and time.monotonic() < deadline:
            pages = [httpx.get(server.metrics_url).text for server in (one, other)]
            stopped = [float(found[1]) for page in pages if (found := STOPPED.search(page))]
        assert sum(stopped) == 2 * SLOTS
        assert min(stopped) > 0


class SilentServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers each request with several responses, each after the seconds that stand in the request's id."""

    def ModelStreamInfer(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for seconds in next(request_iterator).id.split():
            time.sleep(float(seconds))
            yield service_pb2.ModelStreamInferResponse()


@pytest.mark.slow
def test_how_long_a_server_may_be_silent_is_left_to_the_client(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(SilentServer(), server)
    own = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    answered = threading.Event()

    def requests(silences: str) -> Iterator[Any]:
        yield service_pb2.ModelInferRequest(id=silences)
        # As our clients do: another request on the stream may stop the first.
        answered.wait(60)

    try:
        # A second stands for more than a quarter of an hour.
        with nginx((own, own), tmp_path, faster=1000) as address, grpc.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for silences in ("2", "0.1 2 0.1", "0.1 " * 20):
                answered.clear()
                call = stub.ModelStreamInfer(requests(silences))
                for _ in silences.split():
                    next(call)
                answered.set()
                assert list(call) == []
    finally:
        answered.set()
        server.stop(None)
