"""What the client sends."""

from __future__ import annotations

import math
import os
import re
import warnings
from typing import Any

import numpy as np
import pytest

from prism_trt.cli import load, run
from prism_trt.client.generate import Options, new_request_id, request_inputs, stream_generate
from prism_trt.errors import PrismError

TINY = float(np.finfo(np.float32).tiny)


def test_nobody_can_guess_the_id_of_another_request() -> None:
    ids = [new_request_id(name) for name in ("", "", "1", "1")]
    assert len(set(ids)) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", text) for text in ids[:2])
    assert all(re.fullmatch("1-[0-9a-f]{32}", text) for text in ids[2:])


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
        list(stream_generate("127.0.0.1:1", "fox", Options(**options)))


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
