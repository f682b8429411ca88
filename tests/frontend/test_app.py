"""Mistakes on the command line, keys and users."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from prism_trt.cli import load, run
from prism_trt.frontend.guard import ApiKeys
from prism_trt.frontend.schemas import CompletionRequest


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


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--timeout", "inf", "--timeout is inf: pass at most 86400 seconds, a day, and at least 0"),
        ("--timeout", "1e300", "--timeout is 1e+300: pass at most 86400 seconds, a day, and at least 0"),
        ("--grace", "inf", "--grace is inf: pass at most 86400 seconds, a day, and at least 0"),
        ("--max-tokens", "99999999999", "--max-tokens is 99999999999: pass at most 2147483647"),
        ("--max-requests", "99999999999", "--max-requests is 99999999999: pass at most 2147483647"),
        ("--model", os.fsdecode(b"\xff"), "--model is not valid UTF-8: pass text that is"),
        ("--grpc-url", os.fsdecode(b"\xff"), "--grpc-url is not valid UTF-8: pass text that is"),
    ],
)
def test_values_that_cannot_be_used(capsys: pytest.CaptureFixture[str], option: str, value: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert sentence(capsys, "--port", port, option, value) == f"error: {reason}\n"


@pytest.mark.parametrize("option", ["--timeout", "--grace"])
def test_seconds_that_are_no_number(capsys: pytest.CaptureFixture[str], option: str) -> None:
    assert option in sentence(capsys, option, "nan")


def test_keys() -> None:
    keys = ApiKeys(["one", "zwölf"])
    assert keys.holder(b"Bearer one")
    assert keys.holder(b"bearer  one ")
    assert keys.holder("Bearer zwölf".encode())
    for header in (b"", b"Bearer", b"Bearer on", b"Bearer onee", b"Bearer one one", b"Token one", b"one"):
        assert not keys.holder(header)
    assert b"one" not in repr(vars(keys)).encode()
    names = {keys.holder(header) for header in (b"Bearer one", b"bearer one", "Bearer zwölf".encode())}
    assert len(names) == 2


def test_users_are_the_holders_of_keys_or_who_they_say_they_are() -> None:
    body = {"model": "prism", "prompt": "a", "user": "somebody"}

    def user(client: str | None, **changes: Any) -> str:
        return CompletionRequest(**{**body, **changes}).options("prism", 100, 1.0, client).user

    assert user("a name") == "a name"
    assert user(None) == "somebody"
    assert user(None, user=None) == ""
