"""Errors of writing that the user can put right, in one sentence."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from prism_trt.errors import PrismError

_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses inside the block into a `PrismError` that names `path`.

    Covers Python's own writes, safetensors (which hides the system's error number in its message) and ``torch.save``
    (which hides it altogether).

    Raises:
        PrismError: the disk or quota is full, the file system is read-only or denies access, a file lies where a
            directory is needed or the other way round, or the device fails.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _error_number(error)
        if number is None:
            raise
        said = f"cannot write {path} ({os.strerror(number)})"
        if number in _IN_THE_WAY:
            raise PrismError(f"{said}: choose another path, or move what is there out of the way") from None
        fix = "free space or write to a larger disk" if number in _FULL else "check the disk and its permissions"
        raise PrismError(f"{said}: {fix}, then run the same command again to go on") from None


def _error_number(error: Exception) -> int | None:
    """The system's error number behind `error`; None when it is about something else."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return int(found[1]) if found else None
    # torch's zip writer only says that a write came out short; on a healthy disk it does not fail.
    return errno.ENOSPC if "inline_container" in str(error) else None
