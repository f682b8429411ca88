"""What the client sends, and what it makes of the answers, without Triton."""

from __future__ import annotations

import asyncio
import math
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as grpcclient

from prism_trt.cli import load, run
from prism_trt.client.generate import Chunk, Options, request_inputs, stream_generate
from prism_trt.client.streams import ResponseStream
from prism_trt.errors import PrismError
from tests.client.fake import NUMBERS, PIECES, TEXT, Fake, entry, fake_server

TINY = float(np.finfo(np.float32).tiny)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Fake]]:
    with fake_server() as started:
        yield started


def answer(url: str, **options: Any) -> list[Chunk]:
    return list(stream_generate(url, "fox", Options(**options)))


def test_an_answer_in_one_piece_is_all_pieces(server: tuple[str, Fake]) -> None:
    pieces = answer(server[0], log_probs=0)
    (whole,) = answer(server[0], log_probs=0, stream=False)
    assert [piece.text for piece in pieces] == list(PIECES)
    assert whole.text == TEXT
    assert list(whole.log_probs) == [entry(piece) for piece in PIECES]
    assert whole.statistics == pieces[-1].statistics
    assert whole.statistics is not None
    assert (whole.statistics.finish_reason, whole.statistics.num_output_tokens) == ("stop", 7)
    assert whole.statistics.num_reused_tokens == NUMBERS["num_reused_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_may_take_longer_than_the_timeout(stream: bool) -> None:
    with fake_server(pause=0.5) as (url, _):  # 3.5 seconds
        assert "".join(chunk.text for chunk in answer(url, stream=stream, timeout=2.0)) == TEXT


@pytest.mark.parametrize("stream", [False, True])
def test_silence_is_noticed(stream: bool) -> None:
    silence = pytest.raises(PrismError, match=r"the server sent nothing for 0\.1 s")
    with fake_server(pause=0.5) as (url, fake), silence:
        answer(url, stream=stream, timeout=0.1)
    first, second = fake.asked
    assert second["stop"] and second["id"] == first["id"]


def test_nobody_can_guess_the_id_of_another_request(server: tuple[str, Fake]) -> None:
    url, fake = server
    fake.asked.clear()

    async def ask(name: str) -> None:
        async with grpcclient.InferenceServerClient(url) as client:
            stream = ResponseStream(client, "prism", request_inputs("fox", Options()), name)
            while (await stream.next(10)).statistics is None:
                pass
            await stream.close()

    for _ in range(2):
        answer(url)
        for name in ("", "1"):
            asyncio.run(ask(name))
    ids = [asked["id"] for asked in fake.asked]
    assert len(set(ids)) == 6
    assert all(re.fullmatch("(1-)?[0-9a-f]{32}", text) for text in ids)
    assert sum(text.startswith("1-") for text in ids) == 2


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (1e-50, TINY),
        (1e-40, TINY),
        (-1e-50, -TINY),
        (0.0, 0.0),
        (1e300, float(np.finfo(np.float32).max)),
        (math.inf, math.inf),
        (0.9, float(np.float32(0.9))),
    ],
)
def test_what_is_not_0_does_not_become_0(value: float, sent: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = request_inputs("fox", Options(top_p=value, temperature=value))
    found = {tensor.name(): tensor._get_content() for tensor in tensors}
    assert found["top_p"] == found["temperature"] == np.float32(sent).tobytes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_tokens": 99999999999}, "max_tokens is 99999999999: pass at most 2147483647"),
        ({"max_tokens": -99999999999}, "max_tokens is -99999999999: pass a positive number"),
        ({"top_k": 2**31}, "top_k is 2147483648: pass at most 2147483647"),
        ({"log_probs": 2**31}, "log_probs is 2147483648: pass at most 2147483647"),
        ({"seed": 2**64}, "seed is 18446744073709551616: pass at most 18446744073709551615"),
        ({"seed": -1}, "seed is -1: pass a positive number"),
        ({"timeout": math.inf}, "timeout is inf: pass at most 86400 seconds"),
        ({"timeout": math.nan}, "timeout is nan: pass at most 86400 seconds"),
        ({"timeout": -1.0}, "timeout is -1: pass at most 86400 seconds, a day, and at least 0"),
        ({"stop": ("\udcff",)}, "a stop word is not valid UTF-8"),
        ({"user": "\ud800"}, "the user's name is not valid UTF-8"),
        ({"model": "\udcff"}, "the model's name is not valid UTF-8"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_a_server_is_looked_for(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PrismError, match=sentence):
        answer("127.0.0.1:1", **options)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([os.fsdecode(b"\xff\xfe")], "error: the prompt is not valid UTF-8: pass text that is\n"),
        (["fox", "--stop", os.fsdecode(b"\xff")], "error: a stop word is not valid UTF-8: pass text that is\n"),
        (["fox", "--url", os.fsdecode(b"\xff")], "error: the server's address is not valid UTF-8: pass text that is\n"),
        (["fox", "--max-tokens", "99999999999"], "error: max_tokens is 99999999999: pass at most 2147483647\n"),
        (["fox", "--top-k", "99999999999"], "error: top_k is 99999999999: pass at most 2147483647\n"),
        (["fox", "--timeout", "inf"], "error: timeout is inf: pass at most 86400 seconds, a day, and at least 0\n"),
    ],
)
def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(load("client"), arguments)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", sentence)


def test_the_command_prints_the_same_streamed_or_not(
    server: tuple[str, Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ([], ["--stream"]):
        with pytest.raises(SystemExit) as ended:
            run(load("client"), ["fox", "--url", server[0], *extra])
        assert not ended.value.code
        assert capsys.readouterr() == (TEXT + "\n", "")
