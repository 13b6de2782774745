"""Trains on several GPUs: one process per GPU, started by `torchrun`, each with its share of every batch.

Only gradients travel between the processes. Examples are numbered, so each process draws its own without asking.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from refinetool.errors import UsageError


@dataclass(frozen=True, slots=True)
class Ranks:
    """The place of this process among those that train together: rank 0 to count - 1."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, numbers: Tensor) -> Tensor:
        """Return this process's part of a batch's examples, which all have the same size.

        Raises:
            UsageError: The batch can't be divided.
        """
        if len(numbers) % self.count:
            raise UsageError(
                f"a batch of {len(numbers)} images can't be shared by {self.count} processes; "
                "choose a multiple of their number with --batch"
            )
        return numbers.view(self.count, -1)[self.rank]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the processes, in place."""
        if self.count > 1 and tensors:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            dist.all_reduce(flat)
            means = torch.split(flat / self.count, [tensor.numel() for tensor in tensors])
            for tensor, mean in zip(tensors, means, strict=True):
                tensor.copy_(mean.view_as(tensor))

    def agree(self, value: float, *, device: str) -> float:
        """Return the value of rank 0, so that all processes decide alike."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(shared, src=0)
        return float(shared)


ALONE = Ranks()


def join_ranks(device: str) -> tuple[Ranks, str]:
    """Join the processes that `torchrun` started, if it did, and return this one's place and device."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE, device
    on_gpu = device.startswith("cuda")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return Ranks(dist.get_rank(), count), f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else device
