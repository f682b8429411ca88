"""Memory for a network's constants outside of the process's own.

TensorRT reads the constants during the build, long after they were emitted, and then holds a copy of its own. What is
in mapped files the kernel may drop and read again, so that large models need room for TensorRT's copy only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from prism_trt.storage import writing

Place = Callable[[Tensor], Tensor]
"""Takes a constant's content and returns it at the place where it lives until the network is built."""

_LEAST_BYTES = 1 << 20


def as_it_is(content: Tensor) -> Tensor:
    """The `Place` of networks that fit in memory."""
    return content


def scratch_files(directory: Path, model: nn.Module) -> Place:
    """A `Place` in files of `directory`, which vanish with the tensors that they hold.

    Small constants stay where they are, and so do those that share memory with a tensor of `model`: it outlives the
    build, and `prism_trt.target.loading` maps its files.
    """
    lasting = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}

    def place(content: Tensor) -> Tensor:
        small = content.nbytes < _LEAST_BYTES
        return content if small or content.untyped_storage().data_ptr() in lasting else _mapped_copy(content, directory)

    return place


def _mapped_copy(content: Tensor, directory: Path) -> Tensor:
    """`content` in a file without a name.

    Raises:
        PrismError: the disk does not take it.
    """
    with writing(directory):
        handle, name = tempfile.mkstemp(prefix=".constant.", dir=directory)
        try:
            os.posix_fallocate(handle, 0, content.nbytes)  # a full disk would end the process while copying
            mapped = torch.from_file(name, shared=True, size=content.numel(), dtype=content.dtype)
        finally:
            os.close(handle)
            os.unlink(name)
    return mapped.view(content.shape).copy_(content)
