"""The front end as a process of its own, over the real Triton server of tests/deploy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from prism_trt.deploy.server import TritonServer
from tests.deploy.conftest import engine, engine_path, repository, server, tokenizer

__all__ = ["engine", "engine_path", "repository", "server", "tokenizer"]

ROOT = Path(__file__).parents[2]
KEY = "sk-test-only-0123456789"


class Frontend:
    """A running `python -m prism_trt.frontend`, which may have so many files open."""

    def __init__(self, grpc_url: str, *arguments: str, open_files: int | None = None) -> None:
        self.command = [sys.executable, "-m", "prism_trt.frontend", "--port", "0", "--grpc-url", grpc_url, *arguments]
        if open_files is not None:
            self.command = ["sh", "-c", f'ulimit -n {open_files}; exec "$0" "$@"', *self.command]
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving prism: http"), self.stop()
        self.url = line.split()[-1]
        """With the path /v1."""

    def openai(self, key: str = KEY, http_client: httpx.Client | None = None) -> openai.OpenAI:
        """OpenAI's client, which must not hide failures by trying again."""
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60, http_client=http_client)

    def health(self, name: str) -> int:
        """Status of a health endpoint."""
        return httpx.get(self.url.replace("/v1", f"/health/{name}"), timeout=60).status_code

    def stop(self) -> str:
        """End it and return what it logged."""
        self.process.terminate()
        return self.process.communicate(timeout=60)[1]


@contextmanager
def running(grpc_url: str, *arguments: str, open_files: int | None = None) -> Iterator[Frontend]:
    """A front end that is ended with the block."""
    frontend = Frontend(grpc_url, *arguments, open_files=open_files)
    try:
        yield frontend
    finally:
        if frontend.process.poll() is None:
            frontend.stop()


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# first\nsk-another\n\n{KEY}\n")
    return path


@pytest.fixture(scope="session")
def frontend(server: TritonServer, key_file: Path) -> Iterator[Frontend]:
    with running(server.grpc_url, "--api-key-file", str(key_file), "--max-body-bytes", "65536") as started:
        yield started


@pytest.fixture
def client(frontend: Frontend) -> openai.OpenAI:
    return frontend.openai()
