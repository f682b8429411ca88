"""The processes of a run: one, or those that torchrun starts.

Every update is cut into parts that the ranks share; the losses of all parts are averaged over the rows of the whole
update, so that the sum of the ranks' gradients is the gradient of one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from prism_trt.config import StrictModel
from prism_trt.errors import PrismError

_TIMEOUT = timedelta(days=1)
"""Other ranks wait while the first one generates answers."""
_TORCHRUN = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
_ON_ALL_RANKS = StateDictOptions(full_state_dict=True)
_ON_FIRST_RANK = StateDictOptions(full_state_dict=True, cpu_offload=True)


class WorldConfig(StrictModel):
    """Where a run computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int
    size: int
    device: torch.device
    sharded: bool
    """Parameters, gradients and optimizer state are sharded over the ranks (FSDP2); else replicated (DDP)."""

    @property
    def first(self) -> bool:
        """This process writes files and reports."""
        return self.rank == 0

    def alone(self) -> World:
        """A world of this process only, on the same device."""
        return replace(self, rank=0, size=1)

    def wrap(self, objective: nn.Module) -> nn.Module:
        """`objective` on this rank's device, its gradients summed over the ranks (its parameters sharded with fsdp)."""
        objective = objective.to(self.device)
        if self.size == 1:
            return objective
        if not self.sharded:
            return DistributedDataParallel(objective)
        fully_shard(objective)
        assert isinstance(objective, FSDPModule)
        return objective

    @contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around one part of an update: gradients are exchanged in the last part only."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            yield

    def sum(self, *values: Tensor) -> None:
        """Add up CPU tensors over the ranks, in place."""
        if self.size > 1:
            for value in values:
                whole = value.to(self.device)
                dist.all_reduce(whole)
                value.copy_(whole)

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.size > 1:
            dist.barrier()


ALONE = World(0, 1, torch.device("cpu"), sharded=False)
"""A run of one process."""


@contextmanager
def open_world(config: WorldConfig) -> Iterator[World]:
    """The world of this process: as torchrun's environment says, else alone.

    Raises:
        PrismError: the device does not exist.
    """
    size, rank, local = (int(os.environ.get(name, default)) for name, default in _TORCHRUN.items())
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local >= torch.cuda.device_count():
        raise PrismError(
            f"process {local} of this host needs a GPU of its own but there are {torch.cuda.device_count()}: "
            "lower torchrun's --nproc-per-node, or pass --device cpu"
        )
    place = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    sharded = config.parallel == "fsdp"
    if size == 1:
        yield World(0, 1, place, sharded)
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield World(rank, size, place, sharded)
    finally:
        dist.destroy_process_group()


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """State of a model by parameter name on the CPU of every rank, whole whatever the world; a collective call."""
    state: dict[str, Any] = get_model_state_dict(model, options=_ON_ALL_RANKS)
    return {name: value.cpu() for name, value in state.items()}


def whole_moments(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """State of a model's optimizers by parameter name, likewise, but on the first rank only."""
    return get_optimizer_state_dict(model, optimizers, options=_ON_FIRST_RANK)


def restore_state(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], weights: dict[str, Any], moments: dict[str, Any]
) -> None:
    """Load what `whole_weights` and `whole_moments` returned, in a world of any size."""
    set_model_state_dict(model, weights, options=_ON_ALL_RANKS)
    set_optimizer_state_dict(model, optimizers, moments, options=_ON_ALL_RANKS)
