"""What a number or a text must be to be sent at all; the rest is for the server to judge."""

from __future__ import annotations

from prism_trt.errors import PrismError

INT32 = range(-(2**31), 2**31)
UINT64 = range(2**64)
_MOST_SECONDS = 86_400.0
"""A day: what no clock overflows with."""


def check_seconds(name: str, seconds: float) -> None:
    """Raises PrismError unless `seconds` can be waited for."""
    if not 0 <= seconds <= _MOST_SECONDS:
        raise PrismError(f"{name} is {seconds:g}: pass at most {_MOST_SECONDS:g} seconds, a day, and at least 0")


def check_integer(name: str, value: int, allowed: range) -> None:
    """Raises PrismError unless `value` is in `allowed`: numpy would silently change it."""
    if value not in allowed:
        limit = f"at most {allowed[-1]}" if value > 0 else "a positive number"
        raise PrismError(f"{name} is {value}: pass {limit}")


def check_text(name: str, text: str) -> None:
    """Raises PrismError if `text` holds what is no character; arguments that are no UTF-8 do."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PrismError(f"{name} is not valid UTF-8: pass text that is") from None
