"""Loading and unloading the model of a server that goes on, by those who hold its key."""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from prism_trt.client.generate import Chunk, Options, stream_generate
from prism_trt.deploy.admin import HEADER, read_key
from prism_trt.deploy.readiness import Readiness
from prism_trt.deploy.repository import write_repository
from prism_trt.deploy.server import TritonServer
from prism_trt.deploy.supervisor import Supervision, Supervisor
from prism_trt.engines.manifest import ENGINE_KIND, ENGINE_MANIFEST
from prism_trt.errors import PrismError
from prism_trt.manifest import own_fields, read_manifest, write_manifest
from tests.deploy.conftest import SLOTS, TREE
from tests.deploy.load import LONG
from tests.deploy.supervised import run_to_the_end

KEY = "kept:by=the,operator/1+1"
PATIENCE = 60
SHORT = Options(max_tokens=20, timeout=PATIENCE)
QUICK = Supervision(canary_interval=0.1, hang_timeout=1.0, restarts=0)


@pytest.fixture
def other_engine(engine_path: Path, tmp_path: Path) -> Path:
    """An engine that answers differently: every weight has the other sign."""
    other = tmp_path / "other"
    shutil.copytree(engine_path, other)
    weights = np.fromfile(other / "weights.bin", dtype=np.uint16)
    (weights ^ 0x8000).tofile(other / "weights.bin")
    fields = own_fields(read_manifest(other, ENGINE_MANIFEST, ENGINE_KIND))
    write_manifest(other, ENGINE_MANIFEST, ENGINE_KIND, fields)
    return other


@pytest.fixture
def exchangeable(engine_path: Path, tmp_path: Path) -> Iterator[TritonServer]:
    repository = write_repository(engine_path, tmp_path / "repository", tree=TREE, threads=1)
    with TritonServer(repository, grace=0, admin_key=KEY) as running:
        yield running


def ask(server: TritonServer, action: str, key: str | None = KEY) -> int:
    """Load or unload the model through the repository API; returns the status."""
    url = f"{server.http_url}/v2/repository/models/prism/{action}"
    request = urllib.request.Request(url, method="POST", headers={} if key is None else {HEADER: key})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def text_of(chunks: Iterator[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def answer(server: TritonServer) -> str:
    return text_of(stream_generate(server.grpc_url, "fox", SHORT))


def await_state(server: TritonServer, wanted: str | None) -> None:
    deadline = time.monotonic() + PATIENCE
    while server.absence() != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_engines_are_exchanged_while_the_server_goes_on(
    exchangeable: TritonServer, engine_path: Path, other_engine: Path
) -> None:
    server = exchangeable
    before = answer(server)
    processes = {process.pid: process.name() for process in psutil.Process(os.getpid()).children(recursive=True)}
    for key in (None, "x" * len(KEY)):
        assert ask(server, "unload", key) == ask(server, "load", key) == 403
    assert server.absence() is None

    streams = [stream_generate(server.grpc_url, "fox", Options(max_tokens=LONG // 2)) for _ in range(SLOTS)]
    begun = [next(stream).text for stream in streams]
    assert ask(server, "unload") == 200
    with pytest.raises(PrismError, match="try again in a moment"):
        answer(server)
    assert server.absence() == "the model is being unloaded"
    ended = [list(stream) for stream in streams]
    assert len({first + text_of(iter(chunks)) for first, chunks in zip(begun, ended, strict=True)}) == 1
    for chunks in ended:
        assert chunks[-1].statistics is not None
        assert chunks[-1].statistics.finish_reason == "length"
    await_state(server, "the model is not loaded: load it again")
    assert not server.wait(3), "the keeper takes that for a crash"

    write_repository(other_engine, server.repository, tree=TREE, threads=1, overwrite=True)
    assert ask(server, "load") == 200
    assert server.absence() is None
    after = answer(server)
    assert after != before
    # In place: the old model answers what runs on it, the new one what comes.
    stream = stream_generate(server.grpc_url, "fox", Options(max_tokens=LONG))
    begun = [next(stream).text]
    write_repository(engine_path, server.repository, tree=TREE, threads=1, overwrite=True)
    assert ask(server, "load") == 200
    assert answer(server) == before
    assert (begun[0] + text_of(stream)).startswith(after)
    assert not server.wait(3)
    server.probe(PATIENCE)
    left = {process.pid: process.name() for process in psutil.Process(os.getpid()).children(recursive=True)}
    gone = {name for pid, name in processes.items() if pid not in left}
    assert gone == {name for name in processes.values() if name.startswith("triton_python")}


def test_a_model_that_dies_after_it_was_exchanged_is_noticed(exchangeable: TritonServer) -> None:
    for action in ("unload", "load"):
        assert ask(exchangeable, action) == 200
    models = [
        process
        for process in psutil.Process(os.getpid()).children(recursive=True)
        if str(exchangeable.repository) in " ".join(process.cmdline()) and process.name().startswith("triton_python")
    ]
    models[-1].kill()
    with pytest.raises(PrismError, match=r"the server's model process died|the server ended by itself"):
        exchangeable.wait(PATIENCE)


def test_an_unloaded_model_is_not_ready_and_not_replaced(exchangeable: TritonServer) -> None:
    server, state, said = exchangeable, Readiness(), queue.Queue[str]()
    state.problem = None
    watching = threading.Thread(target=run_to_the_end, args=(Supervisor(server, QUICK, state, said.put), said))
    watching.start()
    try:
        assert ask(server, "unload") == 200
        deadline = time.monotonic() + PATIENCE
        while state.problem != "the model is not loaded: load it again" and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(3 * QUICK.hang_timeout)
        assert state.problem == "the model is not loaded: load it again"
        assert said.empty()
        assert ask(server, "load") == 200
        deadline = time.monotonic() + PATIENCE
        while state.problem is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert state.problem is None
    finally:
        server.stop()
        watching.join(PATIENCE)


def test_without_a_key_of_the_operator_nothing_is_unloaded(server: TritonServer) -> None:
    assert ask(server, "unload", server.admin_key) in (400, 403, 503)
    server.probe(PATIENCE)
    assert server.absence() is None


def test_a_key_is_one_long_word(tmp_path: Path) -> None:
    file = tmp_path / "key"
    with pytest.raises(PrismError, match=r"cannot read the key .*key: No such file"):
        read_key(file)
    for content, sentence in (
        (b"\n", "has 0 characters: choose one of at least 16"),
        (b"fifteen letters", "has 15 characters"),
        (b"two words that are long\n", "is not one word"),
        ("Größe" * 4, "is not one word"),
        (b"\xff" * 20, "is not a text file"),
    ):
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(PrismError, match=sentence) as refused:
            read_key(file)
        assert "Größe" not in str(refused.value)
    file.write_text(f"{KEY}\n")
    assert read_key(file) == KEY
