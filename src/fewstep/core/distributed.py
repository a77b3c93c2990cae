"""The little that data-parallel training needs, without a wrapper: start-up, mean of gradients, agreement."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**25


def start(device: torch.device) -> None:
    """Joins the process group when started by torchrun; does nothing otherwise or the second time."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda" and device.index is None:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def rank() -> int:
    """This process's number, 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for every process."""
    if dist.is_initialized():
        dist.barrier()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces every gradient by its mean over the processes, in flat buckets of at most 2^25 elements."""
    if world() == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for p in parameters:
        if p.grad is None:
            # Every process must reduce the same tensors, used there or not.
            p.grad = torch.zeros_like(p)
        if bucket and (size + p.grad.numel() > BUCKET or p.grad.dtype != bucket[0].dtype):
            _reduce(bucket)
            bucket, size = [], 0
        bucket.append(p.grad)
        size += p.grad.numel()
    if bucket:
        _reduce(bucket)


def _reduce(bucket: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in bucket])
    dist.all_reduce(flat)
    flat /= world()
    for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        g.copy_(part.view_as(g))


def broadcast(module: nn.Module) -> None:
    """Gives every process rank 0's weights: random initialisation differs between processes."""
    if world() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, 0)


def average(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if world() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= world()
    return value


def agree(value: float) -> float:
    """Rank 0's value on every process: clocks differ, decisions must not."""
    if world() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]
