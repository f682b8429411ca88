"""The texts of errors."""

from __future__ import annotations

from typing import get_args

import pytest

from prism_trt.deploy.interface import Fault, error_text, parse_error


@pytest.mark.parametrize("fault", get_args(Fault))
def test_errors_tell_whose_fault_they_are(fault: Fault) -> None:
    assert parse_error(error_text(fault, "a [b]: c\nd")) == (fault, "a [b]: c\nd")


@pytest.mark.parametrize("text", ["", "Request for unknown model", "[NONSENSE] a", "INTERNAL a", "a [INTERNAL] b"])
def test_errors_of_others_have_no_fault(text: str) -> None:
    assert parse_error(text) == (None, text)
