"""Mistakes on the command line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from prism_trt.cli import load, run
from prism_trt.frontend.guard import ApiKeys


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run(load("frontend"), arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# none yet\n\n")
    assert "can be reached from other machines: pass --api-key-file" in sentence(capsys, "--host", "0.0.0.0")
    assert "holds no API key" in sentence(capsys, "--api-key-file", str(keys))
    assert "cannot read the API keys" in sentence(capsys, "--api-key-file", str(tmp_path / "absent"))
    keys.write_bytes(b"\xff\xfe")
    assert "is not a text file" in sentence(capsys, "--api-key-file", str(keys))
    assert "pass both" in sentence(capsys, "--tls-cert", str(keys))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}" in sentence(capsys, "--port", port)


def test_keys() -> None:
    keys = ApiKeys(["one", "zwölf"])
    assert keys.accept(b"Bearer one")
    assert keys.accept(b"bearer  one ")
    assert keys.accept("Bearer zwölf".encode())
    for header in (b"", b"Bearer", b"Bearer on", b"Bearer onee", b"Bearer one one", b"Token one", b"one"):
        assert not keys.accept(header)
    assert b"one" not in repr(vars(keys)).encode()
