"""What is kept of a stream: at most so many rows, the same ones in whatever batches and processes they come."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Multipliers of an integer hash (SplitMix64's), as signed 64-bit numbers.
_ODD = (-4658895280553007687, -7723592293110705685)
# Room for so many bytes of rows is set aside at once: pages cost nothing before they are written, while the smaller
# copies of a tensor that grows stay with the process after they are freed.
ROOM = 2**28


def keyed(ids: Tensor) -> Tensor:
    """(N,) int64: a hash of each id, the same on every machine; the order of hashes is a random order of ids."""
    value = ids.long() + 1
    for odd in _ODD:
        value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * odd
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


class Kept:
    """At most ``most`` rows of a stream, chosen by the hash of their ids: a random subset that depends on nothing else.

    All rows are kept while there are no more.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.ids = torch.empty(0, dtype=torch.int64)
        self.rows: Tensor | None = None
        self._space: Tensor | None = None

    def add(self, rows: Tensor, ids: Tensor) -> Kept:
        """Takes in rows (B, ...) with ids (B,). Returns itself."""
        if self._space is None:
            self._space = torch.empty(0, *rows.shape[1:], dtype=rows.dtype)
        free = min(self.most - len(self.ids), len(rows))
        if free:
            self._grow(len(self.ids) + free)
            self._space[len(self.ids) : len(self.ids) + free] = rows[:free]
            self.ids = torch.cat([self.ids, ids[:free]])
            rows, ids = rows[free:], ids[free:]
        if len(rows):
            keys = keyed(torch.cat([self.ids, ids]))
            chosen = torch.zeros(len(keys), dtype=torch.bool)
            chosen[keys.topk(self.most, largest=False).indices] = True
            leave = (~chosen[: self.most]).nonzero()[:, 0]
            enter = chosen[self.most :].nonzero()[:, 0]
            # In place: a second copy of the features of large networks would not fit beside the first.
            self._space[leave], self.ids[leave] = rows[enter], ids[enter]
        self.rows = self._space[: len(self.ids)]
        return self

    def _grow(self, count: int) -> None:
        assert self._space is not None
        if count > len(self._space):
            shape = self._space.shape[1:]
            room = ROOM // max(1, shape.numel() * self._space.element_size())
            larger = self._space.new_empty(min(self.most, max(count, room, 2 * len(self._space))), *shape)
            larger[: len(self.ids)] = self._space[: len(self.ids)]
            self._space = larger

    def in_order(self) -> Tensor:
        """The rows in the order of their ids; the same tensor at every call."""
        assert self.rows is not None
        order = self.ids.argsort()
        if not bool((order == torch.arange(len(order))).all()):
            # Some columns at a time, for the reason above.
            flat = self.rows.flatten(1)
            for columns in torch.arange(flat.shape[1]).split(64):
                flat[:, columns] = flat[order[:, None], columns]
            self.ids = self.ids[order]
        return self.rows

    def all_reduce(self) -> Kept:
        """Joins the streams of all processes, so that each keeps the same rows. Returns itself."""
        assert self.rows is not None
        rows, ids = gathered(self.rows), gathered(self.ids)
        self.ids, self.rows, self._space = torch.empty(0, dtype=torch.int64), None, None
        return self.add(rows, ids)


def gathered(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all processes after each other, on the CPU; each may bring another number of them."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    count = torch.tensor([len(rows)], device=device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    most = int(max(counts))
    padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)]).cpu()
